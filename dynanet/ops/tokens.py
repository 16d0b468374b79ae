"""Rows are tokens: they leave, but those that stay must no longer attend to them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dynanet.core.rows import Rows


class Tokens(NamedTuple):
    """Tokens with their membership: a rectangle with `alive` (dense), or packed with `lengths` (sparse).

    Linears and norms work on `x` in either layout; only attention must know who is there.

    Attributes:
        x: (B, T, D), or packed (N, D), sample after sample.
        alive: (B, T), 1 for the tokens that are there; None: all.
        lengths: tokens of every sample when packed; None when x is a rectangle.
    """

    x: Tensor
    alive: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def first(self) -> Tensor:
        """1 at every sample's first token (CLS), shaped as x without its last axis."""
        if self.lengths is None:
            mark = torch.zeros_like(self.x[..., 0])
            mark[:, 0] = 1
            return mark
        mark = torch.zeros_like(self.x[:, 0])
        lengths = torch.tensor(self.lengths, dtype=torch.long, device=mark.device)
        mark[(lengths.cumsum(0) - lengths)[lengths > 0]] = 1
        return mark


class TokenRows(Rows):
    """Tokens leave; `alive` (dense) or `lengths` (sparse) tells those that stay. Lead is (B, T), or (N,) when packed.

    The unit goes from Tokens to a tensor of token features, (B, T, D) or (N, D).
    """

    def whole(self, x: Any, lead: tuple[int, ...]) -> Any:
        """The rectangle as it is: the layer has written keep into `alive`."""
        return x

    def take(self, x: Any, lead: tuple[int, ...], index: Tensor) -> Tokens:
        """The kept tokens, packed."""
        assert isinstance(x, Tokens)
        if x.lengths is None:
            samples, sample = lead[0], index // lead[1]
        else:
            samples = len(x.lengths)
            lengths = torch.tensor(x.lengths, device=index.device)
            sample = torch.arange(samples, device=index.device).repeat_interleave(lengths)[index]
        counts = torch.zeros(samples, dtype=torch.long, device=index.device)
        counts = counts.index_add(0, sample, torch.ones_like(sample))
        packed = x.x.flatten(0, len(lead) - 1).index_select(0, index)
        return Tokens(packed, lengths=tuple(counts.tolist()))

    def put(self, y: Any, lead: tuple[int, ...], index: Tensor, otherwise: Any) -> Any:
        """`otherwise` (lead..., D) with y (r, D) at `index`."""
        home = otherwise.flatten(0, len(lead) - 1).index_copy(0, index, y)
        return home.reshape(*lead, *y.shape[1:])

    def mask(self, y: Any, lead: tuple[int, ...], keep: Tensor, otherwise: Any) -> Any:
        """The blend, token by token."""
        k = keep.reshape(lead)[..., None].to(y.dtype)
        return k * y + (1 - k) * otherwise


TOKEN_ROWS = TokenRows()


def attend(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, heads: int) -> Tensor:
    """Multi-head attention among the tokens that are there.

    Args:
        query: (B, T, D), or (N, D) when the tokens are packed; key and value alike.
        key: as query.
        value: as query.
        tokens: says who is there.
        heads: D is split into so many.

    Returns:
        As query. Equal lengths run as one rectangle, unequal ones sample by sample: nothing is padded.
    """
    if tokens.lengths is None:
        if tokens.alive is not None and tokens.alive.requires_grad:
            return _weighted_attend(query, key, value, heads, tokens.alive)
        mask = None if tokens.alive is None else (tokens.alive > 0)[:, None, None, :]
        return _heads_attend(query, key, value, heads, mask)
    if len(set(tokens.lengths)) == 1 and tokens.lengths[0] > 0:
        q, k, v = (z.unflatten(0, (len(tokens.lengths), -1)) for z in (query, key, value))
        return _heads_attend(q, k, v, heads).flatten(0, 1)
    samples = zip(*(z.split(tokens.lengths) for z in (query, key, value)), strict=True)
    parts = [_heads_attend(q[None], k[None], v[None], heads)[0] for q, k, v in samples if q.shape[0]]
    return torch.cat(parts) if parts else torch.zeros_like(query)


def _weighted_attend(query: Tensor, key: Tensor, value: Tensor, heads: int, alive: Tensor) -> Tensor:
    """Attention whose exponentials are multiplied with `alive` (DynamicViT, arXiv:2106.02034, eq. 10-11): the same as a
    boolean mask where alive is 0 or 1, and the way by which a gradient reaches the gate that dropped a token."""
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(-2, -3) for z in (query, key, value))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = (logits - logits.amax(-1, keepdim=True).detach()).exp() * alive[:, None, None, :]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return (weights @ v).transpose(-2, -3).flatten(-2)


def _heads_attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(-2, -3) for z in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-2, -3).flatten(-2)
