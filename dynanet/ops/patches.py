"""Pixels of an image as rows: a unit sees the patch around each."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dynanet.core.errors import StructureError
from dynanet.core.rows import LeadingAnswers, over_tensors


class Patches(LeadingAnswers):
    """Pixels of (B, C, H, W) tensors, lead (B, H, W): a unit maps patches (rows, C, P, P) to one answer per pixel.

    Answers are (B, H, W, ...), and are put back as leading rows are.

    Args:
        size: side P of a patch, odd; zeros beyond the image's edge.

    Raises:
        StructureError: an even size.
    """

    def __init__(self, size: int) -> None:
        if size < 1 or size % 2 == 0:
            raise StructureError(f"a patch has a centre pixel, so its side must be odd; got {size}")
        self.size = size

    def whole(self, x: Any, lead: tuple[int, ...]) -> Any:
        """The patch of every pixel."""
        return over_tensors(lambda t: self._cut(t, torch.arange(t[:, 0].numel(), device=t.device)), x)

    def take(self, x: Any, lead: tuple[int, ...], index: Tensor) -> Any:
        """The patches of the pixels at `index`."""
        return over_tensors(lambda t: self._cut(t, index), x)

    def _cut(self, image: Tensor, index: Tensor) -> Tensor:
        """(r, C, P, P), laid out channels last: pixels are gathered whole, as rows of (pixels, C)."""
        batch, channels, height, width = image.shape
        half = self.size // 2
        wide = width + self.size - 1
        padded = F.pad(image, (half, half, half, half)).permute(0, 2, 3, 1).reshape(-1, channels)
        sample = index // (height * width)
        row = index // width % height
        corner = (sample * (height + self.size - 1) + row) * wide + index % width
        span = torch.arange(self.size, device=index.device)
        offsets = (span[:, None] * wide + span).flatten()
        pixels = padded.index_select(0, (corner[:, None] + offsets).flatten())
        return pixels.reshape(-1, self.size, self.size, channels).permute(0, 3, 1, 2)
