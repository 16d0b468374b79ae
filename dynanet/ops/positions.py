"""Chains of convolutions at chosen positions of images: gathered as rows, computed as matrix products."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import StructureError
from dynanet.core.plain import check_plain, hooked, is_plain, is_sequential

_POSITION_WISE = (
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.Sigmoid,
    nn.Tanh,
)


class Places(ABC):
    """Where the parts of a `PositionChain` run, and where their inputs lie."""

    @abstractmethod
    def start(self, image: Tensor, *, everywhere: bool) -> Tensor:
        """The rows of the first part.

        Args:
            image: every position of the images as a row, (positions, C) or as the places need it.
            everywhere: the first part has no convolution, and may run at every position.
        """

    @abstractmethod
    def read(self, part: int, conv: nn.Conv2d, rows: Tensor, image: Tensor) -> Tensor:
        """What the first convolution of a later part reads, (n, k * k * C).

        Args:
            part: its number.
            conv: the convolution.
            rows: what the part before it returned.
            image: as in `start`.
        """

    @abstractmethod
    def within(self, part: int) -> AbstractContextManager[None]:
        """The frame of a part in the trace."""


class PositionChain:
    """A chain of stride-1 "same" convolutions and position-wise layers, run at chosen positions.

    The chain falls into parts. Each but the first starts with a convolution that reads neighbours, so that a part is
    computed on one set of positions. Matrices of the kernels are kept while weights do not change: the memory of the
    weights a second time, 4 bytes per float32 weight of the chain.

    Args:
        unit: an nn.Sequential of such layers, or one of them.

    Attributes:
        layers: of the unit, flat, as at construction or the last `refresh`.
        parts: the layers in parts.

    Raises:
        StructureError: a unit that cannot run on positions.
    """

    def __init__(self, unit: nn.Module) -> None:
        check_unit(unit)
        self.unit = unit
        self.layers: list[nn.Module] = []
        self.parts: list[list[nn.Module]] = []
        self._matrices: dict[nn.Module, tuple[Tensor, int, Tensor]] = {}
        self.refresh()

    def refresh(self) -> bool:
        """Read the unit's layers again, and return whether they changed.

        A session folds batch norms into the convolutions before them.
        """
        layers = layers_of(self.unit)
        if layers == self.layers and self.parts:
            return False
        self.layers = layers
        self.parts = [[]]
        for layer in layers:
            if reads_neighbours(layer):
                self.parts.append([])
            self.parts[-1].append(layer)
        return True

    @property
    def _everywhere(self) -> bool:
        return len(self.parts) > 1 and not any(isinstance(layer, nn.Conv2d) for layer in self.parts[0])

    def dense(self, x: Tensor, keep_B1HW: Tensor | None = None) -> Tensor:
        """Run over whole images.

        Args:
            x: (B, C, H, W).
            keep_B1HW: later convolutions find zeros where it is 0, as in a `Region`; None: they find everything.
        """
        for j, part in enumerate(self.parts):
            if keep_B1HW is not None and j > (1 if self._everywhere else 0):
                x = x * keep_B1HW
            for layer in part:
                x = layer(x)
        return x

    def rows(self, places: Places, image: Tensor) -> Tensor:
        """Run at positions: their answers, (n, C').

        Args:
            places: not empty.
            image: as `places` take it.

        Raises:
            StructureError: a layer that was hooked after the chain was made.
        """
        for layer in self.layers:
            if hooked(layer):
                check_plain(layer, type(layer))
        rows = places.start(image, everywhere=self._everywhere)
        for j, part in enumerate(self.parts):
            with places.within(j):
                for i, layer in enumerate(part):
                    if not isinstance(layer, nn.Conv2d):
                        rows = _position_wise(layer, rows, fresh=rows is not image)
                    elif j and i == 0:
                        rows = self._convolved(layer, places.read(j, layer, rows, image))
                    else:
                        rows = self._convolved(layer, rows)
        return rows

    def _convolved(self, conv: nn.Conv2d, patches: Tensor) -> Tensor:
        """A convolution of (n, k * k * C)."""
        if conv.groups == 1:
            matrix = self._matrix(conv)
            return patches @ matrix if conv.bias is None else torch.addmm(conv.bias, patches, matrix)
        patches = patches.view(len(patches), -1, conv.in_channels).transpose(1, 2).unflatten(2, conv.kernel_size)
        return functional.conv2d(patches, conv.weight, conv.bias, groups=conv.groups)[:, :, 0, 0]

    def _matrix(self, conv: nn.Conv2d) -> Tensor:
        """The kernel as (k * k * C, C'); kept while the weight is the same."""
        weight = conv.weight
        if weight.requires_grad and torch.is_grad_enabled() or weight.is_inference():
            return _as_matrix(weight)
        kept = self._matrices.get(conv)
        if kept is None or kept[0] is not weight or kept[1] != weight._version:
            kept = self._matrices[conv] = weight, weight._version, _as_matrix(weight.detach())
        return kept[2]


def check_unit(unit: nn.Module) -> int:
    """Check that a unit can run on tiles or positions, and return how far it reads beyond them on each side.

    Raises:
        StructureError: a layer that reads neighbours in another way than a stride-1 same convolution, or a dynamic
            layer inside.
    """
    reads = 0
    for layer in layers_of(unit):
        if isinstance(layer, (nn.Conv2d, *_POSITION_WISE)):
            check_plain(layer, nn.Conv2d, *_POSITION_WISE)
        if isinstance(layer, nn.Conv2d):
            sizes = zip(padding(layer), layer.dilation, layer.kernel_size, strict=True)
            if layer.stride != (1, 1) or any(2 * p != d * (k - 1) for p, d, k in sizes):
                raise StructureError(f"a unit on tiles needs stride-1 'same' convolutions; got {layer}")
            if layer.padding_mode != "zeros" or len(set(padding(layer))) > 1:
                raise StructureError(f"a unit on tiles needs square kernels with zero padding; got {layer}")
            reads += padding(layer)[0]
        elif isinstance(layer, Dynamic):
            raise StructureError(
                f"{type(layer).__name__} lies inside a spatial unit, where a row would belong to its tile and to "
                f"the halos around it; put it around the spatial layer instead"
            )
        elif not isinstance(layer, _POSITION_WISE):
            raise StructureError(
                f"{type(layer).__name__} cannot run on tiles: a unit is a Sequential of stride-1 'same' "
                f"convolutions, batch norms and activations"
            )
    return reads


def layers_of(unit: nn.Module) -> list[nn.Module]:
    """The layers of nested Sequentials, without those that do nothing."""
    if is_sequential(unit):
        return [layer for child in unit for layer in layers_of(child)]
    return [] if is_plain(unit, nn.Identity) else [unit]


def padding(layer: nn.Module) -> tuple[int, ...]:
    """A layer's padding down and across, in positions."""
    if not isinstance(layer, nn.Conv2d) or layer.padding == "valid":
        return 0, 0
    if isinstance(layer.padding, str):
        return tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return layer.padding


def reads_neighbours(layer: nn.Module) -> bool:
    """Whether a layer of a checked unit reads more than its own position."""
    return padding(layer)[0] > 0


def neighbours(index: Tensor, shape: Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The flat positions that a "same" convolution reads, (n, k * k); one past the last beyond an edge.

    Args:
        index: (n,) flat positions of (B, H, W).
        shape: (B, H, W).
        kernel: sizes down and across.
        dilation: down and across.
    """
    batch, height, width = shape
    down, across = (
        d * torch.arange(k, device=index.device) - d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)
    )
    rows = (index // width % height)[:, None, None] + down[:, None]
    columns = (index % width)[:, None, None] + across
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    first = (index // (height * width))[:, None, None] * (height * width)
    return torch.where(inside, first + rows * width + columns, batch * height * width).flatten(1)


@lru_cache(maxsize=32)
def neighbours_of_all(
    shape: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...], device: torch.device
) -> Tensor:
    """`neighbours` of every position, (positions, k * k). The last 32 tables are kept, of 8 bytes per number."""
    return neighbours(torch.arange(math.prod(shape), device=device), shape, kernel, dilation)


def row_numbers(index: Tensor, positions: int) -> Tensor:
    """The row of every position, (positions + 1,): its place in `index`, or len(index) where it is not in there."""
    row_of = torch.full((positions + 1,), len(index), device=index.device)
    row_of[index] = torch.arange(len(index), device=index.device)
    return row_of


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _position_wise(layer: nn.Module, rows: Tensor, *, fresh: bool) -> Tensor:
    """A norm or an activation of rows; in place only where they are `fresh`."""
    if isinstance(layer, nn.BatchNorm2d):
        return layer(rows[:, :, None, None])[:, :, 0, 0]
    if isinstance(layer, nn.ReLU):
        return rows.relu_() if fresh and not rows.requires_grad else rows.relu()
    return layer(rows if fresh else rows.clone())
