"""Region convolutions: chains of same convolutions at chosen positions of an image, which find zeros elsewhere.

Li et al. 2017, arXiv:1704.01344, section 3.1. Unlike a tile, a region of any shape has no halo: nothing is computed
twice, and nothing beyond it.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.dynamic import Dynamic
from dynanet.ops.tiles import Tiles


class Region:
    """The positions of an image that are computed, and where their neighbours lie. One for all chains of a stage.

    Args:
        layer: whose unit the chains belong to.
        unit: which.
        keep_B1HW: 1 at the positions to compute.
    """

    def __init__(self, layer: Dynamic, unit: int, keep_B1HW: Tensor) -> None:
        self.shape = (keep_B1HW.shape[0], keep_B1HW.shape[2], keep_B1HW.shape[3])
        self.kept = layer.kept(keep_B1HW[:, 0])
        self.frame = self.kept.frame(layer, unit)
        self._around: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        self._row_of: Tensor | None = None
        self._patches: Tensor | None = None

    @property
    def index(self) -> Tensor:
        """(n,) flat positions of the rows; in the sparse form only."""
        assert self.kept.index is not None, "the dense form has no rows"
        return self.kept.index

    def around(self, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """For every position of the region the k * k that a convolution reads, (n * k * k,) each: among all positions
        of the images, and among the rows of the region. One past the last is where there is none.
        """
        kernel, dilation = (conv.kernel_size[0], conv.kernel_size[1]), (conv.dilation[0], conv.dilation[1])
        if (kernel, dilation) not in self._around:
            index = self.index
            if self._row_of is None:
                positions = self.shape[0] * self.shape[1] * self.shape[2]
                self._row_of = torch.full((positions + 1,), len(index), device=index.device)
                self._row_of[index] = torch.arange(len(index), device=index.device)
            places = _neighbours(self.shape, kernel, dilation, index.device).index_select(0, index).flatten()
            self._around[kernel, dilation] = places, self._row_of.index_select(0, places)
        return self._around[kernel, dilation]

    def gather(self, rows: Tensor, places: Tensor) -> Tensor:
        """rows[places], into memory that the next call writes again where no gradient is wanted."""
        if rows.requires_grad or torch.is_grad_enabled():
            return rows.index_select(0, places)
        size = len(places) * rows.shape[1]
        if self._patches is None or self._patches.numel() < size or self._patches.dtype != rows.dtype:
            self._patches = rows.new_empty(size)
        return torch.index_select(rows, 0, places, out=self._patches[:size].view(len(places), rows.shape[1]))


class RegionChain:
    """A chain of stride-1 same convolutions and position-wise layers, at the positions of a region.

    The first convolution reads the image as it is, beyond the region too; further ones find zeros outside it.

    Args:
        unit: an nn.Sequential of them, or one of them.

    Raises:
        StructureError: a unit that cannot run on positions.
    """

    def __init__(self, unit: nn.Module) -> None:
        Tiles(1, 2**30).check(unit)
        self.unit = unit
        self._layers = _layers(unit)
        convolutions = [i for i, layer in enumerate(self._layers) if isinstance(layer, nn.Conv2d)]
        self._first = convolutions[0] if convolutions else len(self._layers)
        reads = bool(convolutions) and _reads(self._layers[self._first])
        self._ahead = self._first if reads else 0  # layers that see the whole image, for neighbours to be read from
        self._matrices: dict[nn.Module, tuple[Tensor, int, Tensor]] = {}

    def dense(self, keep_B1HW: Tensor, x: Tensor) -> Tensor:
        """The chain over whole images, with zeros between its convolutions where nothing is kept."""
        for i, layer in enumerate(self._layers):
            x = layer(x * keep_B1HW if i > self._first and _reads(layer) else x)
        return x

    def rows(self, region: Region, image: Tensor) -> Tensor:
        """The chain's answer at the region's positions, (n, C').

        Args:
            region: not empty.
            image: (positions + 1, C), every position of the images as a row, and a row of zeros.
        """
        rows = image
        for i in range(self._ahead):
            rows = _position_wise(self._layers[i], rows, fresh=False)
        if self._ahead:  # beyond the image lie zeros, whatever a norm makes of them
            rows = torch.cat([rows[:-1], torch.zeros_like(rows[-1:])])
        elif self._first == len(self._layers) or not _reads(self._layers[self._first]):
            rows = image.index_select(0, region.index)
        for i in range(self._ahead, len(self._layers)):
            layer = self._layers[i]
            if not isinstance(layer, nn.Conv2d):
                rows = _position_wise(layer, rows, fresh=True)
            elif not _reads(layer):
                rows = self._linear(layer, rows)
            elif i == self._first:
                rows = self._gathered(layer, rows, region, region.around(layer)[0])
            else:
                rows = self._gathered(layer, functional.pad(rows, (0, 0, 0, 1)), region, region.around(layer)[1])
        return rows

    def _gathered(self, conv: nn.Conv2d, rows: Tensor, region: Region, places: Tensor) -> Tensor:
        """A convolution that reads `rows` at `places`."""
        return self._linear(conv, region.gather(rows, places).view(len(region.index), -1))

    def _linear(self, conv: nn.Conv2d, patches: Tensor) -> Tensor:
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


def flat_image(x_BCHW: Tensor) -> Tensor:
    """(B * H * W + 1, C), a copy: every position as a row, and a row of zeros."""
    return functional.pad(x_BCHW.permute(0, 2, 3, 1).flatten(0, 2), (0, 0, 0, 1))


@lru_cache(maxsize=32)
def _neighbours(
    shape: tuple[int, int, int], kernel: tuple[int, int], dilation: tuple[int, int], device: torch.device
) -> Tensor:
    """(positions, k * k): what a convolution reads at every position of (B, H, W); one past the last beyond an edge."""
    batch, height, width = shape
    steps = [d * torch.arange(k, device=device) - d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
    rows = torch.arange(height, device=device)[:, None] + steps[0]
    columns = torch.arange(width, device=device)[:, None] + steps[1]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[None, :, None, :]
    places = (rows[:, None, :, None] * width + columns[None, :, None, :]).expand_as(inside)
    first = height * width * torch.arange(batch, device=device)[:, None, None, None, None]
    return torch.where(inside, places + first, batch * height * width).flatten(3).flatten(0, 2)


def _layers(unit: nn.Module) -> list[nn.Module]:
    if isinstance(unit, nn.Sequential):
        return [layer for child in unit for layer in _layers(child)]
    return [] if isinstance(unit, nn.Identity) else [unit]


def _reads(layer: nn.Module) -> bool:
    """It reads neighbours."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _position_wise(layer: nn.Module, rows: Tensor, *, fresh: bool) -> Tensor:
    """A norm or an activation of rows; in place only where they are `fresh`."""
    if isinstance(layer, nn.BatchNorm2d):
        return layer(rows[:, :, None, None])[:, :, 0, 0]
    if isinstance(layer, nn.ReLU):
        return rows.relu_() if fresh and not rows.requires_grad else rows.relu()
    return layer(rows if fresh else rows.clone())
