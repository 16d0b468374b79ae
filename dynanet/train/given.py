"""Batches as they are given: what numpy and data sets make is brought into the form that training needs, or refused.

Integer labels of any width become class numbers, (B, 1) beside logits (B, C) becomes (B,), and float64 inputs take the
precision of the model. What the model or the objective cannot take is a DataError that says what to mend.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dynanet.core.errors import DataError

_TORCH = (
    RuntimeError,
    ValueError,
    IndexError,
    TypeError,
    NotImplementedError,
)  # what torch raises for shapes, dtypes and sizes of tensors


def pair(batch: Any) -> tuple[Any, Any]:
    """The inputs and the labels of a batch.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        parts = f" of {len(batch)}" if isinstance(batch, tuple | list | dict) else ""
        raise DataError(
            f"a batch is a {type(batch).__name__}{parts}; expected (inputs, labels): make the data set answer pairs"
        )
    x, y = batch
    return x, y


def rows_of(y: Any) -> int:
    """How many rows the labels of a batch are for."""
    first = next((leaf for leaf in tree_leaves(y) if isinstance(leaf, Tensor) and leaf.dim()), None)
    return first.shape[0] if first is not None else 1


def single(x: Any, model: nn.Module) -> Any:
    """With the float64 tensors that numpy makes in the precision of the model."""
    mine = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float64)
    if mine is torch.float64:
        return x
    return tree_map(lambda t: t.to(mine) if isinstance(t, Tensor) and t.dtype is torch.float64 else t, x)


def class_numbers(answer: Any, y: Any) -> Any:
    """Labels as objectives expect them: whole numbers as int64, and (B, 1) as (B,) beside logits (B, C)."""
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex():
        return y
    if isinstance(answer, Tensor) and answer.dim() == y.dim() > 1 and answer.shape[1] > y.shape[1] == 1:
        y = y.squeeze(1)
    return y.long()


@contextmanager
def answering(x: Any, y: Any) -> Iterator[None]:
    """While the model answers: errors of torch become those of the data.

    Raises:
        DataError: the model cannot take the inputs.
    """
    try:
        yield
    except _TORCH as error:
        if not _of_data(error):
            raise
        todo = "give inputs of the shape, dtype and range that the model was built for"
        if "more than 1 value per channel" in str(error):  # a batch norm's, of one row without pixels
            todo = "a batch norm needs more: use drop_last=True, or a batch size that leaves no last batch of one row"
        raise DataError(f"the model cannot train on a batch with inputs {_told(x)}: {_line(error)}; {todo}") from error


@contextmanager
def judging(answer: Any, y: Any) -> Iterator[None]:
    """While the objective judges an answer: errors of torch become those of the labels.

    Raises:
        DataError: the objective cannot take the labels.
    """
    try:
        yield
    except _TORCH as error:
        if not _of_data(error):
            raise
        todo = "give labels of the shape and dtype that the objective expects, class numbers (B,) in most"
        seen = ""
        if isinstance(error, IndexError) and isinstance(y, Tensor) and y.numel():  # of a label that is not a class
            todo = "build the model with as many classes as the data has, and number them from 0"
            seen = f" from {y.min().item():g} to {y.max().item():g}"
        raise DataError(
            f"the objective failed with {_line(error)} for labels{seen}, {_told(y)} beside answers {_told(answer)}; "
            f"{todo}"
        ) from error


def _of_data(error: Exception) -> bool:
    """Whether other data could mend an error of torch: it has none of the types of ours, of compilers and devices."""
    return type(error) in _TORCH and not any(word in str(error) for word in ("memory", "CUDA error"))


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"of type {type(value).__name__}"


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
