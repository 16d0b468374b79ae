"""States of recurrent cells: h for nn.GRUCell and nn.RNNCell, the pair (h, c) for nn.LSTMCell."""

from typing import Any

from torch import Tensor


def zero_state(like: Tensor, rows: int, hidden: int, *, pair: bool) -> Any:
    """The state before the first step: h, or (h, c) for a pair, (rows, hidden) each, in the dtype of `like`."""
    zero = like.new_zeros(rows, hidden)
    return (zero, zero) if pair else zero


def hidden_of(state: Any) -> Tensor:
    """The h of a state, (rows, hidden)."""
    return state[0] if isinstance(state, tuple) else state
