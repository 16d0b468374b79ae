"""Tokens as rows: those that stay must no longer attend to those that left."""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dynanet.core.dynamic import Dynamic
from dynanet.core.rows import LEADING, Rows, over_tensors
from dynanet.ops.native.attention import attend_packed
from dynanet.ops.native.library import fit


class Tokens(NamedTuple):
    """Tokens with their membership: a rectangle with `alive` (dense), or packed with `lengths` (sparse).

    Linears and norms work on `x` in either layout; only attention needs to know which tokens are there.

    Attributes:
        x: (B, T, D), or packed (N, D), sample after sample.
        alive: (B, T), 1 for the tokens that are there; None: all.
        lengths: tokens of every sample when packed; None when x is a rectangle.
        size: how many tokens each stands for, shaped as x without its last axis; None: one each. A token of size s is
            attended to as s equal ones.
        attention: of the class token to each, as of `class_attention`; None where no layer needs it.
        key: by which similar tokens are found, (..., d), as of `summed_key`; None where no layer needs it.
    """

    x: Tensor
    alive: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    size: Tensor | None = None
    attention: Tensor | None = None
    key: Tensor | None = None

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

    def there(self) -> Tensor:
        """True where there is a token, shaped as x without its last axis."""
        return torch.ones_like(self.x[..., 0], dtype=torch.bool) if self.alive is None else self.alive > 0

    def membership(self) -> Tensor:
        """`alive`, or ones if it is None."""
        return torch.ones_like(self.x[..., 0]) if self.alive is None else self.alive

    @property
    def present(self) -> Tensor | None:
        """`alive` with an axis for units, for `Dynamic.tap`; None: all."""
        return None if self.alive is None else self.alive[..., None]


class TokenRows(Rows):
    """Rows are tokens; `alive` (dense) or `lengths` (sparse) says which stay. Lead is (B, T), or (N,) when packed.

    x is Tokens, or a pytree of Tokens and tensors that start with the lead; answers are pytrees of such tensors.
    """

    def whole(self, x: Any, lead: tuple[int, ...]) -> Any:
        """The rectangle itself: the layer has written keep into `alive`."""
        return x

    def take(self, x: Any, lead: tuple[int, ...], index: Tensor) -> Any:
        """The kept tokens, packed. All tokens are a view: nothing is copied."""
        if isinstance(x, Tokens):
            return self._packed(x, lead, index)
        if isinstance(x, tuple | list):
            return type(x)(self.take(part, lead, index) for part in x)
        return LEADING.take(x, lead, index)

    def _packed(self, tokens: Tokens, lead: tuple[int, ...], index: Tensor) -> Tokens:
        taken = LEADING.take(tokens._replace(lengths=None, alive=None), lead, index)
        if index.numel() == math.prod(lead):
            return taken._replace(lengths=(lead[1],) * lead[0] if tokens.lengths is None else tokens.lengths)
        if tokens.lengths is None:
            samples = lead[0]
            sample = index // lead[1]
        else:
            samples = len(tokens.lengths)
            sample = sample_of_row(tokens.lengths, index.device)[index]
        return taken._replace(lengths=tuple(torch.bincount(sample, minlength=samples).tolist()))

    def put(self, y: Any, lead: tuple[int, ...], index: Tensor, otherwise: Any) -> Any:
        """`otherwise` (lead..., D) with y (r, D) at `index`."""
        return LEADING.put(y, lead, index, otherwise)

    def mask(self, y: Any, lead: tuple[int, ...], keep: Tensor, otherwise: Any) -> Any:
        """The blend, token by token."""

        def blend(t: Tensor, o: Tensor) -> Tensor:
            k = _like(keep.reshape(lead), t).to(t.dtype)
            return k * t + (1 - k) * o

        return over_tensors(blend, y, otherwise)


TOKEN_ROWS = TokenRows()


class TokenLayer(Dynamic, ABC):
    """A dynamic layer whose rows are tokens, and in whose units the kept tokens attend to each other."""

    degree = 2

    @abstractmethod
    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens to Tokens of the same layout."""

    def price(self, keep: Tensor, unit_macs: Tensor) -> Tensor:
        """MACs per sample, (B,): a n + b n^2 in a unit with n kept tokens.

        Args:
            keep: (B, ..., units), in the whole batch.
            unit_macs: (units, 2), a and b of every unit, measured.
        """
        n = keep.to(unit_macs).flatten(1, -2).sum(1)  # (B, units)
        return (n * unit_macs[:, 0] + n.square() * unit_macs[:, 1]).sum(1)


def attend(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, heads: int) -> Tensor:
    """Multi-head attention among the tokens that are there, each counted as many times as its `size` says.

    Packed tokens run in one native call (see `library.fit`); without it equal lengths run as one rectangle, unequal
    ones sample by sample. Nothing is padded.

    Args:
        query: (B, T, D), or (N, D) when the tokens are packed.
        key: as query.
        value: as query.
        tokens: which tokens are there.
        heads: number of heads that D is split into.

    Returns:
        As query.
    """
    if tokens.lengths is None:
        if tokens.alive is not None and tokens.alive.requires_grad:
            weight = tokens.alive if tokens.size is None else tokens.alive * tokens.size
            return _weighted_attend(query, key, value, heads, weight)
        return _heads_attend(query, key, value, heads, _bias(tokens, query.dtype))
    bias = None if tokens.size is None else tokens.size.log().to(query.dtype)
    if fit(query, key, value, bias):
        return attend_packed(query, key, value, bias, tokens.lengths, heads)
    samples = len(tokens.lengths)
    if len(set(tokens.lengths)) == 1 and tokens.lengths[0] > 0:
        q, k, v = (z.unflatten(0, (samples, -1)) for z in (query, key, value))
        mask = None if bias is None else bias.reshape(samples, 1, 1, -1)
        return _heads_attend(q, k, v, heads, mask).flatten(0, 1)
    return _attend_each(query, key, value, tokens.lengths, heads, bias)


def attend_causal(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, heads: int) -> Tensor:
    """Multi-head attention of every token to itself and to those before it; arguments as of `attend`.

    Sizes do not count, and no gradient reaches `alive`.
    """
    if tokens.lengths is not None:
        return _attend_each(query, key, value, tokens.lengths, heads, causal=True)
    mask = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool, device=query.device).tril()
    if tokens.alive is not None:
        # A dropped token attends to itself, so that its softmax is not over nothing; its answer is not used.
        own = torch.eye(query.shape[1], dtype=torch.bool, device=query.device)
        mask = mask & ((tokens.alive > 0)[:, None, None, :] | own)
    return _heads_attend(query, key, value, heads, mask)


def class_attention(query: Tensor, key: Tensor, tokens: Tokens, heads: int) -> Tensor:
    """How much the first token attends to each token of its sample: the softmax of its query, averaged over heads.

    Attentiveness in Liang et al. 2022 (EViT, arXiv:2202.07800, section 3.2). 0 where a token is missing.

    Args:
        query: as in `attend`.
        key: as in `attend`.
        tokens: which tokens are there.
        heads: number of heads that D is split into.

    Returns:
        (B, T), or (N,) when packed.
    """
    rectangle = Rectangle(tokens)
    first = first_rows(query, tokens)
    logits = (spread_rows(first, tokens) * key).unflatten(-1, (heads, -1)).sum(-1) * (heads / key.shape[-1]) ** 0.5
    weights = rectangle.of(logits, fill=-torch.inf)
    if tokens.size is not None:
        weights = weights + rectangle.of(tokens.size, fill=1.0).log()[..., None]
    # A sample without tokens has no weights: not a softmax of minus infinities, which is NaN.
    weights = (weights - weights.amax(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).min)).exp()
    weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return rectangle.rows(weights.mean(-1))


def summed_key(key: Tensor, heads: int) -> Tensor:
    """Sum keys over heads, (..., D) to (..., D / heads).

    In direction it is the mean, by which Bolya et al. 2023 (ToMe, arXiv:2210.09461) compare tokens.
    """
    first, *others = key.chunk(heads, -1)
    return sum(others, first.clone())


def rank(score: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Rank tokens within their sample by ascending score; of equal scores the earlier is lower.

    Minus and plus infinity are scores like others. Tokens that are not there are not counted, and their rank means
    nothing.

    Args:
        score: (B, T) or (N,).
        tokens: which tokens are there.

    Returns:
        Ranks from 0, and the sample's number of tokens, both as score, int64.
    """
    rectangle = Rectangle(tokens)
    if rectangle.full:
        order = rectangle.of(score, fill=0.0).argsort(dim=1, stable=True)
        count = torch.full_like(order, order.shape[1])
    else:
        there = rectangle.there()
        order = torch.where(there, rectangle.of(score, fill=0.0), torch.inf).argsort(dim=1, stable=True)
        # Tokens with infinite scores must still come before missing ones: a second, stable sort by presence.
        order = order.gather(1, (~there).gather(1, order).to(torch.int8).argsort(dim=1, stable=True))
        count = there.sum(1, keepdim=True).expand_as(order)
    place = torch.arange(order.shape[1], device=score.device).expand_as(order)
    ranks = torch.zeros_like(order).scatter(1, order, place)
    return rectangle.rows(ranks), rectangle.rows(count)


def spread_rows(per_sample: Tensor, tokens: Tokens) -> Tensor:
    """Repeat (B, ...) for every token of the sample: (B, 1, ...), which broadcasts, or (N, ...) when packed."""
    if tokens.lengths is None:
        return per_sample[:, None]
    return per_sample.index_select(0, sample_of_row(tokens.lengths, per_sample.device))


def first_rows(t: Tensor, tokens: Tokens) -> Tensor:
    """Select every sample's first token of t, (B, T, ...) or (N, ...): (B, ...); 0 where it has no tokens."""
    if tokens.lengths is None:
        return t[:, 0]
    lengths = torch.tensor(tokens.lengths, dtype=torch.long, device=t.device)
    if t.shape[0] == 0:
        return t.new_zeros(lengths.shape[0], *t.shape[1:])
    rows = t.index_select(0, (lengths.cumsum(0) - lengths).clamp(max=t.shape[0] - 1))
    return torch.where(_like(lengths > 0, rows), rows, 0.0)


def sum_by_sample(x: Tensor, tokens: Tokens) -> Tensor:
    """Sum over every sample's tokens, (B, ...); x must be 0 where a token is missing."""
    if tokens.lengths is None:
        return x.sum(1)
    sums = x.new_zeros(len(tokens.lengths), *x.shape[1:])
    return sums.index_add(0, sample_of_row(tokens.lengths, x.device), x)


def sample_of_row(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """The sample of every packed row, (N,)."""
    counts = torch.tensor(lengths, dtype=torch.long, device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(counts, output_size=sum(lengths))


class Rectangle:
    """Values of tokens as one rectangle (B, longest, ...), and back: to sort or compare them within a sample.

    Attributes:
        full: it has a token everywhere.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._place: Tensor | None = None
        self._longest = tokens.x.shape[1]
        lengths = tokens.lengths
        self.full = tokens.alive is None if lengths is None else len(set(lengths)) == 1
        if lengths is not None:
            self._longest = max(lengths, default=0)
        if lengths is not None and not self.full:
            counts = torch.tensor(lengths, dtype=torch.long, device=tokens.x.device)
            sample = sample_of_row(lengths, tokens.x.device)
            start = counts.cumsum(0) - counts
            within = torch.arange(sample.shape[0], device=tokens.x.device) - start[sample]
            self._place = sample * self._longest + within

    def of(self, t: Tensor, fill: float) -> Tensor:
        """(B, T, ...) or (N, ...) to (B, longest, ...); `fill` where a token is missing."""
        lengths = self._tokens.lengths
        if lengths is None:
            return t if self.full else torch.where(_like(self._tokens.there(), t), t, fill)
        if self._place is None:
            return t.reshape(len(lengths), self._longest, *t.shape[1:])
        padded = t.new_full((len(lengths) * self._longest, *t.shape[1:]), fill).index_copy(0, self._place, t)
        return padded.reshape(len(lengths), self._longest, *t.shape[1:])

    def there(self) -> Tensor:
        """(B, longest), True where there is a token."""
        if self._tokens.lengths is None:
            return self._tokens.there()
        return self.of(torch.ones_like(self._tokens.x[:, 0]), fill=0.0) > 0

    def rows(self, t: Tensor) -> Tensor:
        """(B, longest, ...) back to the layout of the tokens."""
        if self._tokens.lengths is None:
            return t
        return t.flatten(0, 1) if self._place is None else t.flatten(0, 1).index_select(0, self._place)


def _like(mark: Tensor, t: Tensor) -> Tensor:
    """With as many axes as t has, the last ones 1."""
    return mark.reshape(*mark.shape, *[1] * (t.dim() - mark.dim()))


def _bias(tokens: Tokens, dtype: torch.dtype) -> Tensor | None:
    """What is added to the logits of a rectangle; a boolean mask where tokens have no sizes."""
    if tokens.size is None:
        return None if tokens.alive is None else (tokens.alive > 0)[:, None, None, :]
    bias = tokens.size.log().to(dtype)
    return (bias if tokens.alive is None else bias.masked_fill(tokens.alive <= 0, -torch.inf))[:, None, None, :]


def _weighted_attend(query: Tensor, key: Tensor, value: Tensor, heads: int, weight: Tensor) -> Tensor:
    """Attention whose exponentials are multiplied with a weight (DynamicViT, arXiv:2106.02034, eq. 10-11).

    The same as a boolean mask where the weight is 0 or 1; a gradient reaches the gate that dropped a token.
    """
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(-2, -3) for z in (query, key, value))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = (logits - logits.amax(-1, keepdim=True).detach()).exp() * weight[:, None, None, :]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return (weights @ v).transpose(-2, -3).flatten(-2)


def _heads_attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(-2, -3) for z in (query, key, value))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return y.transpose(-2, -3).flatten(-2)


def _attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    heads: int,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """Attention of packed tokens, sample by sample; `bias` (N,) is added to the scores of a key."""
    columns = [z.split(lengths) for z in (query, key, value)]
    biases = [None] * len(lengths) if bias is None else [b[None, None, None] for b in bias.split(lengths)]
    answers = [
        _heads_attend(q[None], k[None], v[None], heads, mask, causal=causal)[0]
        for q, k, v, mask in zip(*columns, biases, strict=True)
        if q.shape[0]
    ]
    return torch.cat(answers) if answers else torch.zeros_like(query)
