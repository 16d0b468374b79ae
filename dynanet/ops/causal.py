"""Causal attention among the tokens that are there: each attends to itself and to those before it."""

import torch
from torch import Tensor
from torch.nn import functional

from dynanet.ops.tokens import Tokens


def attend_causal(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, heads: int) -> Tensor:
    """As `ops.tokens.attend`, without looking ahead.

    Args:
        query: (B, T, D), or (N, D) when the tokens are packed; key and value alike.
        key: as query.
        value: as query.
        tokens: says who is there.
        heads: D is split into so many.
    """
    if tokens.lengths is None:
        mask = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool, device=query.device).tril()
        if tokens.alive is not None:
            # Itself in any case: what is not there attends to something, and nobody looks at it.
            own = torch.eye(query.shape[1], dtype=torch.bool, device=query.device)
            mask = mask & ((tokens.alive > 0)[:, None, None, :] | own)
        return _attend(query, key, value, heads, mask)
    samples = zip(*(z.split(tokens.lengths) for z in (query, key, value)), strict=True)
    parts = [_attend(q[None], k[None], v[None], heads)[0] for q, k, v in samples if q.shape[0]]
    return torch.cat(parts) if parts else torch.zeros_like(query)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(-2, -3) for z in (query, key, value))
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return y.transpose(-2, -3).flatten(-2)
