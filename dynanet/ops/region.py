"""Region convolutions: chains of same convolutions at chosen positions of an image, which find zeros elsewhere.

Li et al. 2017, arXiv:1704.01344, section 3.1. Unlike a tile, a region of any shape has no halo: nothing is computed
twice, and nothing beyond it.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.dynamic import Dynamic
from dynanet.ops.positions import Places, neighbours_of_all, row_numbers


class Region(Places):
    """The positions of an image that are computed. All parts of all chains of a stage run there.

    The first convolution of a chain reads the image as it is, beyond the region too; further ones find zeros outside
    the region. Images are given as `flat_image` makes them.

    Args:
        layer: the layer whose unit the chains belong to.
        unit: its number.
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

    def start(self, image: Tensor, *, everywhere: bool) -> Tensor:
        """The rows of the region; the image where the next part reads beyond it."""
        return image if everywhere else image.index_select(0, self.index)

    def read(self, part: int, conv: nn.Conv2d, rows: Tensor, image: Tensor) -> Tensor:
        """What a convolution reads, (n, k * k * C)."""
        in_image, in_region = self._places(conv)
        if len(rows) < len(image):
            return self._gathered(functional.pad(rows, (0, 0, 0, 1)), in_region)
        if rows is not image:  # beyond the image lie zeros, whatever a norm makes of them
            rows = torch.cat([rows[:-1], torch.zeros_like(rows[-1:])])
        return self._gathered(rows, in_image)

    def within(self, part: int) -> AbstractContextManager[None]:
        """Nothing: the layer opens one frame for all parts."""
        return nullcontext()

    def _places(self, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
        """What a convolution reads at every position of the region, (n * k * k,) each.

        The first counts all positions of the images, the second the rows of the region. One past the last stands for a
        position outside.
        """
        key = (conv.kernel_size, conv.dilation)
        if key not in self._around:
            table = neighbours_of_all(self.shape, *key, self.index.device)
            if self._row_of is None:
                self._row_of = row_numbers(self.index, len(table))
            places = table.index_select(0, self.index).flatten()
            self._around[key] = places, self._row_of.index_select(0, places)
        return self._around[key]

    def _gathered(self, rows: Tensor, places: Tensor) -> Tensor:
        """rows[places] as (n, k * k * C), in memory that the next call overwrites where no gradient is wanted."""
        if rows.requires_grad or torch.is_grad_enabled():
            return rows.index_select(0, places).view(len(self.index), -1)
        size = len(places) * rows.shape[1]
        if self._patches is None or self._patches.numel() < size or self._patches.dtype != rows.dtype:
            self._patches = rows.new_empty(size)
        out = self._patches[:size].view(len(places), rows.shape[1])
        return torch.index_select(rows, 0, places, out=out).view(len(self.index), -1)


def flat_image(x_BCHW: Tensor) -> Tensor:
    """Copy images to rows: (B * H * W + 1, C), one per position, and a row of zeros."""
    return functional.pad(x_BCHW.permute(0, 2, 3, 1).flatten(0, 2), (0, 0, 0, 1))
