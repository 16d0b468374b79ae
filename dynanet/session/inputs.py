"""Validate inputs before anything runs."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from dynanet.core.errors import InputError


def check_example(example: Any) -> None:
    """Check that an example is made of tensors whose first axis is the samples.

    Raises:
        InputError: it is not.
    """
    leaves = tree_flatten(example)[0]
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
        came = ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in leaves[:5])
        raise InputError(
            f"the example holds {came or 'nothing'}; expected tensors with the samples as their first axis"
        )


def check_input(x: Any, example: Any) -> None:
    """Compare an input with an example of what the model takes; the batch size is free.

    Args:
        x: tensor, or a pytree of tensors, rows first.
        example: another one, of any batch size.

    Raises:
        InputError: another structure, dtype, number of axes, channels or size; tensors that do not agree on the batch;
            NaN or infinite values.
    """
    if isinstance(x, Tensor) and isinstance(example, Tensor):
        given = [x]
        wanted = [example]
        same = True
    else:
        given, structure = tree_flatten(x)
        wanted, expected = tree_flatten(example)
        same = structure == expected
    if not same or not all(isinstance(t, Tensor) for t in given):
        raise InputError(f"the input is {type(x).__name__}; expected {_described(wanted)}")
    for t, e in zip(given, wanted, strict=True):
        if t.dim() != e.dim() or t.shape[1:] != e.shape[1:]:
            raise InputError(
                f"the input has shape {tuple(t.shape)}; expected (batch, {', '.join(map(str, e.shape[1:]))}): "
                f"{_difference(t, e)}"
            )
        if t.dtype != e.dtype:
            raise InputError(f"the input is {t.dtype}; expected {e.dtype}: convert it with x.to({e.dtype})")
        # One sum shows that nearly every input is finite; others are checked number by number (sums may overflow).
        if t.is_floating_point() and not math.isfinite(t.sum().item()) and not torch.isfinite(t).all():
            rows = (~torch.isfinite(t)).flatten(1).any(1).nonzero().flatten().tolist()
            which = f"{rows[:5]}{f' and {len(rows) - 5} more' if len(rows) > 5 else ''}"
            raise InputError(f"NaN or infinite values in sample(s) {which} of the input; repair them or leave them out")
    if len(given) > 1 and len({t.shape[0] for t in given}) > 1:
        counts = [t.shape[0] for t in given]
        raise InputError(f"{counts} samples in the tensors of the input; give the same number in every tensor")


def _described(tensors: list[Any]) -> str:
    return ", ".join(f"a {t.dtype} tensor of shape (batch, {', '.join(map(str, t.shape[1:]))})" for t in tensors)


def _difference(t: Tensor, e: Tensor) -> str:
    if t.dim() == e.dim() - 1:
        return "the batch axis is missing; add it with x[None]"
    if t.dim() != e.dim():
        return f"{t.dim()} axes instead of {e.dim()}"
    if t.shape[1] != e.shape[1] and t.dim() in (3, 5):
        return f"{t.shape[1]} steps instead of {e.shape[1]}; pad sequences with `pad(..., steps={e.shape[1]})`"
    if t.shape[1] != e.shape[1]:
        return f"{t.shape[1]} channels instead of {e.shape[1]}"
    return "another size; resize or cut the input"
