"""Images cut, warped and resized so that gradients reach the place as well as the pixels; only the answer is sampled.

Jaderberg, Simonyan, Zisserman, Kavukcuoglu: Spatial Transformer Networks, NeurIPS 2015, https://arxiv.org/abs/1506.02025.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.errors import ConfigError, InputError

Size = int | Sequence[int]


class SpatialTransformer(nn.Module):
    """Looks at what a small network points to: an affine map of the output grid, sampled bilinearly (section 3).

    Answers have `size` whatever the input's, so what comes next costs what that size costs. A localisation network that
    answers 0 (let its last layer start with zeros) shows the whole image.

    Args:
        localise: from images (B, C, H, W) to (B, 6), what is added to the identity, row by row (eq. 1).
        size: of the answer: a side, or (height, width).

    Raises:
        ConfigError: a size that is none.
    """

    def __init__(self, localise: nn.Module, size: Size) -> None:
        super().__init__()
        self.localise, self.size = localise, sides(size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, *size).

        Raises:
            InputError: the localisation network answered something else than (B, 6).
        """
        moved = self.localise(x_BCHW)
        if moved.dim() != 2 or moved.shape[1] != 6:
            raise InputError(f"localise answered a tensor of shape {tuple(moved.shape)}; expected (B, 6)")
        identity = torch.eye(2, 3, dtype=moved.dtype, device=moved.device)
        return affine(x_BCHW, identity + moved.unflatten(1, (2, 3)), self.size)


class Resize(nn.Module):
    """`resize` as a layer.

    Args:
        size: of the answer: a side, or (height, width).

    Raises:
        ConfigError: a size that is none.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = sides(size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, *size)."""
        return resize(x_BCHW, self.size)

    def extra_repr(self) -> str:
        """For printing."""
        return f"{self.size[0]} x {self.size[1]}"


def affine(x_BCHW: Tensor, theta_B23: Tensor, size: Size) -> Tensor:
    """Where the affine maps say, zeros beyond the edges (eq. 1 and 5).

    Costs four multiply-accumulates per value of the answer, which a cost model counts, however large the image is.

    Args:
        x_BCHW: images.
        theta_B23: from places in the answer to places in the image, (across, down, 1) to (across, down), both from -1
            at one edge to 1 at the other.
        size: of the answer: a side, or (height, width).
    """
    height, width = sides(size)
    theta = _at_least_single(theta_B23)[:, :, :, None, None]
    across, down = _centres(width, theta), _centres(height, theta)[:, None]
    grid = theta[:, :, 0] * across + theta[:, :, 1] * down + theta[:, :, 2]
    return _sampled(x_BCHW, grid.permute(0, 2, 3, 1))


def crop(x_BCHW: Tensor, place_B2: Tensor, size: Size) -> Tensor:
    """A window of the image, unscaled: the affine map that only moves.

    A window between pixels is interpolated, so that a gradient reaches the place; one on whole pixels is a copy. Costs
    as `affine`.

    Args:
        x_BCHW: images of any size. Where one is smaller than the window it lies in the middle, with zeros around.
        place_B2: (down, across), each from 0 (the window at the upper or left edge) to 1 (at the other).
        size: of the window: a side, or (height, width).
    """
    place, lines = _at_least_single(place_B2), []
    for axis, side in enumerate(sides(size)):
        whole = x_BCHW.shape[2 + axis]
        room = whole - side
        first = place[:, axis, None] * max(room, 0) + min(room, 0) // 2
        pixels = first + torch.arange(side, device=place.device, dtype=place.dtype)
        lines.append((2 * pixels + 1) / whole - 1)
    down, across = torch.broadcast_tensors(lines[0][:, :, None], lines[1][:, None, :])
    return _sampled(x_BCHW, torch.stack([across, down], -1))


def resize(x_BCHW: Tensor, size: Size) -> Tensor:
    """The whole image at another size: bilinear, smoothed first where it shrinks; itself where the size is its own.

    Counts no multiply-accumulates, as resizing does nowhere in the literature.

    Args:
        x_BCHW: images of any size.
        size: of the answer: a side, or (height, width). Another aspect than the image's stretches it.
    """
    height_width = sides(size)
    if tuple(x_BCHW.shape[2:]) == height_width:
        return x_BCHW
    wide = _at_least_single(x_BCHW)  # torch has no such kernel for halves
    return functional.interpolate(wide, height_width, mode="bilinear", antialias=True).to(x_BCHW.dtype)


def sides(size: Size) -> tuple[int, int]:
    """(height, width) of a size that is given as a side or as both.

    Raises:
        ConfigError: anything else than one or two whole numbers of at least 1.
    """
    both = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(both) != 2 or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in both):
        raise ConfigError(f"a size of {size!r} pixels; expected a side of at least 1, or (height, width)")
    return both[0], both[1]


def _sampled(x_BCHW: Tensor, grid_BHW2: Tensor) -> Tensor:
    """At (across, down) from -1 to 1, in the grid's precision: places in bfloat16 would miss by whole pixels."""
    sampled = functional.grid_sample(x_BCHW.to(grid_BHW2.dtype), grid_BHW2, align_corners=False)
    return sampled.to(x_BCHW.dtype)


def _centres(pixels: int, like: Tensor) -> Tensor:
    """Where the middles of so many pixels lie, from -1 at one edge to 1 at the other."""
    return (2 * torch.arange(pixels, device=like.device, dtype=like.dtype) + 1) / pixels - 1


def _at_least_single(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
