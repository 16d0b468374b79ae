"""Differentiable cropping, warping and resizing: gradients reach the position as well as the pixels.

Jaderberg, Simonyan, Zisserman, Kavukcuoglu: Spatial Transformer Networks, NeurIPS 2015, https://arxiv.org/abs/1506.02025.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.errors import ConfigError, InputError, check_sizes

Size = int | Sequence[int]


class SpatialTransformer(nn.Module):
    """Samples the image bilinearly on a grid that a localisation network predicts (section 3).

    The output has one `size` for every input, which sets the cost of what follows. A localisation network that predicts
    0 (start its last layer with zeros) shows the whole image.

    Args:
        localise: from images (B, C, H, W) to (B, 6), added to the identity map row by row (eq. 1).
        size: of the output: a side, or (height, width).

    Raises:
        ConfigError: an invalid size.
    """

    def __init__(self, localise: nn.Module, size: Size) -> None:
        super().__init__()
        self.localise = localise
        self.size = sides(size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, *size).

        Raises:
            InputError: the localisation network does not return (B, 6).
        """
        moved = self.localise(x_BCHW)
        if moved.dim() != 2 or moved.shape[1] != 6:
            raise InputError(f"localise returned a tensor of shape {tuple(moved.shape)}; expected (B, 6)")
        identity = torch.eye(2, 3, dtype=moved.dtype, device=moved.device)
        return affine(x_BCHW, identity + moved.unflatten(1, (2, 3)), self.size)


class Resize(nn.Module):
    """`resize` as a layer.

    Args:
        size: of the output: a side, or (height, width).

    Raises:
        ConfigError: an invalid size.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = sides(size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, *size)."""
        return resize(x_BCHW, self.size)

    def extra_repr(self) -> str:
        """Height and width, for printing."""
        return f"{self.size[0]} x {self.size[1]}"


def affine(x_BCHW: Tensor, theta_B23: Tensor, size: Size) -> Tensor:
    """Sample images on affine grids, with zeros beyond the edges (eq. 1 and 5).

    Costs four MACs per output value, which a cost model counts, independent of the size of the image.

    Args:
        x_BCHW: images.
        theta_B23: maps output positions (across, down, 1) to image positions (across, down), all from -1 at one edge to
            1 at the other.
        size: of the output: a side, or (height, width).
    """
    height, width = sides(size)
    theta = _at_least_single(theta_B23)[:, :, :, None, None]
    across = _centres(width, theta)
    down = _centres(height, theta)[:, None]
    grid = theta[:, :, 0] * across + theta[:, :, 1] * down + theta[:, :, 2]
    return _sampled(x_BCHW, grid.permute(0, 2, 3, 1))


def crop(x_BCHW: Tensor, place_B2: Tensor, size: Size) -> Tensor:
    """Crop a window from each image without scaling.

    A window between pixels is interpolated, so that gradients reach the position; one on whole pixels is a copy. Costs
    as `affine`.

    Args:
        x_BCHW: images of any size. One that is smaller than the window is centred and surrounded by zeros.
        place_B2: position (down, across) of the window, from 0 at the upper or left edge to 1 at the opposite one.
        size: of the window: a side, or (height, width).
    """
    place = _at_least_single(place_B2)
    lines = []
    for axis, side in enumerate(sides(size)):
        whole = x_BCHW.shape[2 + axis]
        room = whole - side
        first = place[:, axis, None] * max(room, 0) + min(room, 0) // 2
        pixels = first + torch.arange(side, device=place.device, dtype=place.dtype)
        lines.append((2 * pixels + 1) / whole - 1)
    down, across = torch.broadcast_tensors(lines[0][:, :, None], lines[1][:, None, :])
    return _sampled(x_BCHW, torch.stack([across, down], -1))


def resize(x_BCHW: Tensor, size: Size) -> Tensor:
    """Resize images bilinearly, with antialiasing; images of this size are returned as they are.

    Counts no MACs, as is usual in the literature.

    Args:
        x_BCHW: images of any size.
        size: of the output: a side, or (height, width). Images of another aspect are stretched.
    """
    height_width = sides(size)
    if tuple(x_BCHW.shape[2:]) == height_width:
        return x_BCHW
    wide = _at_least_single(x_BCHW)  # torch has no kernel for half precision
    return functional.interpolate(wide, height_width, mode="bilinear", antialias=True).to(x_BCHW.dtype)


def sides(size: Size) -> tuple[int, int]:
    """(height, width) of a size that is given as one side or as both.

    Raises:
        ConfigError: not one or two whole numbers of at least 1.
    """
    both = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(both) != 2:
        raise ConfigError(f"size must be a side or (height, width), got {size!r}")
    check_sizes(size=both)
    return both[0], both[1]


def _sampled(x_BCHW: Tensor, grid_BHW2: Tensor) -> Tensor:
    """Sample at (across, down) from -1 to 1, in the grid's precision: bfloat16 would miss by whole pixels."""
    sampled = functional.grid_sample(x_BCHW.to(grid_BHW2.dtype), grid_BHW2, align_corners=False)
    return sampled.to(x_BCHW.dtype)


def _centres(pixels: int, like: Tensor) -> Tensor:
    """Positions of the pixel centres, from -1 at one edge to 1 at the other."""
    return (2 * torch.arange(pixels, device=like.device, dtype=like.dtype) + 1) / pixels - 1


def _at_least_single(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
