"""A small network for the pixels of a hyperspectral image: first a pixel's own spectrum, then its neighbourhood.

The stem and the first exit read single pixels. Over a whole image the stem therefore runs once, not once for each of
the 81 patches that contain a pixel, and pixels that leave at the first exit need no patch. The later stages are
residual 3 x 3 blocks over a patch of stem features.

Patches may be cut before the stem or after it: the stem maps a zero spectrum to 0, so positions beyond the edge of the
scene, or hidden by a split, are 0 for the blocks either way. `spectral_net` returns stages and exits for
`EarlyExit(stages, exits)`; for features cut after the stem use `[nn.Identity(), *stages[1:]]`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def spectral_net(
    bands: int,
    classes: int,
    width: int = 48,
    hidden: int = 64,
    blocks: Sequence[Sequence[tuple[int, int]]] = (((64, 2), (64, 1)), ((64, 1),)),
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Build the stages and exits; stage 0 is the stem.

    Args:
        bands: channels of the input (B, bands, P, P), P odd.
        classes: number of classes.
        width: channels of the stem.
        hidden: units of the hidden layer of the first exit.
        blocks: for every later stage its blocks, each as (channels, stride).

    Returns:
        Two lists of the same length. Stage k maps features to features (B, C, P, P); exit k maps them to logits.
    """
    stages: list[nn.Module] = [SpectralStem(bands, width)]
    exits: list[nn.Module] = [PixelExit(width, hidden, classes)]
    channels = width
    for stage in blocks:
        layers = []
        for out, stride in stage:
            layers.append(ResidualBlock(channels, out, stride))
            channels = out
        stages.append(nn.Sequential(*layers))
        exits.append(PatchExit(channels, classes))
    return stages, exits


class SpectralStem(nn.Module):
    """Spectra to features, pixel by pixel; 0 where a spectrum is all zero."""

    def __init__(self, bands: int, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(bands, width, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(width)
        self.refine = nn.Conv2d(width, width, 1, bias=False)
        self.refine_norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, bands, H, W) to (B, width, H, W)."""
        # The norms alone would not keep zero spectra at 0.
        inside = (x.amax(1, keepdim=True) != 0) | (x.amin(1, keepdim=True) != 0)  # much cheaper than (x != 0).any(1)
        y = F.relu(self.project_norm(self.project(x)))
        y = y + F.relu(self.refine_norm(self.refine(y)))
        return y * inside.to(y.dtype)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (the basic block of He et al., 2016, arXiv:1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        self.past: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.past = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.past(x))


class PixelExit(nn.Module):
    """Classifies the centre pixel by its own features, with one hidden layer."""

    def __init__(self, channels: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.classify = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, P, P) to the logits (B, classes) of the centre pixel."""
        return self.of_pixels(x[:, :, x.shape[2] // 2, x.shape[3] // 2])

    def of_pixels(self, features: Tensor) -> Tensor:
        """Features (N, C) of single pixels to logits (N, classes)."""
        return self.classify(F.relu(self.norm(self.hidden(features))))


class PatchExit(nn.Module):
    """Classifies by the mean over the patch and the centre pixel."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(2 * channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, P, P) to the logits (B, classes) of the centre pixel."""
        centre = x[:, :, x.shape[2] // 2, x.shape[3] // 2]
        return self.classify(torch.cat([x.mean((2, 3)), centre], 1))
