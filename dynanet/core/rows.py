"""Gather rows from a tensor and scatter them back."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dynanet.core.errors import StructureError


class Rows(ABC):
    """Gathers the rows of a tensor and scatters them back. Pure functions of tensors; inputs and answers are pytrees.

    `lead` is the shape of keep without its unit axis: (B,), (B, T), (B, tiles down, tiles across). `index` holds flat
    positions in it. A fast kernel replaces take - work - put here, and nowhere else.

    Attributes:
        flat: a unit sees its rows along one axis, also in the dense form. False where the dense form keeps the layout
            (tokens in their rectangle, tiles in their image).
    """

    flat: bool = False

    @abstractmethod
    def whole(self, x: Any, lead: tuple[int, ...]) -> Any:
        """All rows, as a unit sees them in the dense form."""

    @abstractmethod
    def take(self, x: Any, lead: tuple[int, ...], index: Tensor) -> Any:
        """The rows at `index`, as a unit sees them in the sparse form."""

    @abstractmethod
    def put(self, y: Any, lead: tuple[int, ...], index: Tensor, otherwise: Any) -> Any:
        """`otherwise`, with the rows at `index` replaced by y."""

    @abstractmethod
    def mask(self, y: Any, lead: tuple[int, ...], keep: Tensor, otherwise: Any) -> Any:
        """The blend keep * y + (1 - keep) * otherwise; keep is flat, (rows,). Right for soft keeps too."""

    def call(self, unit: Callable, x: Any) -> Any:
        """Run a unit on what `take` answered."""
        return unit(x)


class LeadingAnswers(Rows, ABC):
    """Answers have the rows as their leading axes, whatever the rows are taken from."""

    flat = True

    def put(self, y: Any, lead: tuple[int, ...], index: Tensor, otherwise: Any) -> Any:
        """`otherwise` (lead..., ...) with y (r, ...) at `index`."""

        def scattered(t: Tensor, o: Tensor) -> Tensor:
            t, o = same_dtype(t, o)
            if index.numel() != math.prod(lead):
                t = _flat(o, lead).index_copy(0, index, t)
            return t.reshape(*lead, *t.shape[1:])

        return over_tensors(scattered, y, otherwise)

    def mask(self, y: Any, lead: tuple[int, ...], keep: Tensor, otherwise: Any) -> Any:
        """The blend, in the layout of `otherwise`."""

        def blend(t: Tensor, o: Tensor) -> Tensor:
            k = keep.to(t.dtype).reshape(t.shape[0], *[1] * (t.dim() - 1))
            return (k * t + (1 - k) * _flat(o, lead)).reshape(*lead, *t.shape[1:])

        return over_tensors(blend, y, otherwise)


class Leading(LeadingAnswers):
    """Rows are the leading axes of every tensor and do not touch each other: samples (B,), tokens (B, T), frames."""

    def whole(self, x: Any, lead: tuple[int, ...]) -> Any:
        """Merge the leading axes of x: (rows, ...)."""
        return over_tensors(lambda t: _flat(t, lead), x)

    def take(self, x: Any, lead: tuple[int, ...], index: Tensor) -> Any:
        """The rows at `index`, (r, ...). All rows are x itself: nothing is copied.

        Raises:
            StructureError: a tensor whose leading axes are not the rows.
        """

        def rows(t: Tensor) -> Tensor:
            if t.shape[: len(lead)] != torch.Size(lead):
                raise StructureError(
                    f"a tensor of shape {tuple(t.shape)} cannot be split into rows {lead}: every tensor that enters a "
                    f"unit needs the rows as its leading axes"
                )
            flat = _flat(t, lead)
            return flat if index.numel() == flat.shape[0] else take_rows(flat, index)

        return over_tensors(rows, x)


LEADING = Leading()


def same_dtype(t: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """Convert two tensors to the dtype that a blend of them has: under autocast a unit answers in another one."""
    if t.dtype is o.dtype:
        return t, o
    dtype = torch.promote_types(t.dtype, o.dtype)
    return t.to(dtype), o.to(dtype)


def take_rows(t: Tensor, index: Tensor) -> Tensor:
    """t[index] along the first axis, in t's memory format (index_select alone would drop channels_last)."""
    if t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last):
        return t.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return t.index_select(0, index)


def over_tensors(f: Callable[..., Tensor], tree: Any, *others: Any) -> Any:
    """Apply f to the tensors of pytrees of one structure. Other leaves (a size, None) stay unchanged."""
    if isinstance(tree, Tensor):  # the common case, without flattening a tree
        return f(tree, *others)
    return tree_map(lambda t, *o: f(t, *o) if isinstance(t, Tensor) else t, tree, *others)


def _flat(t: Tensor, lead: tuple[int, ...]) -> Tensor:
    return t.flatten(0, len(lead) - 1) if len(lead) > 1 else t
