"""States of recurrent cells (h of nn.GRUCell and nn.RNNCell, the pair (h, c) of nn.LSTMCell), and steps to come."""

from typing import Any

import torch
from torch import Tensor


def zero_state(like: Tensor, rows: int, hidden: int, *, pair: bool) -> Any:
    """The state before the first step: h, or (h, c) for a pair, (rows, hidden) each, in the dtype of `like`."""
    zero = like.new_zeros(rows, hidden)
    return (zero, zero) if pair else zero


def hidden_of(state: Any) -> Tensor:
    """The h of a state, (rows, hidden)."""
    return state[0] if isinstance(state, tuple) else state


def next_step(mask: Tensor) -> Tensor:
    """The first time step from each one on at which a mask (B, T) is set, (B, T) int64; T where there is none."""
    steps = mask.shape[1]
    time = torch.arange(steps, device=mask.device)
    return time.where(mask, steps).flip(1).cummin(1).values.flip(1)
