"""Augmentation of batches of square patches around a pixel: rotations, flips, and pasting of other patches."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class RotatePaste:
    """Rotates or flips every patch at random; some get a half-plane of another patch of the batch.

    The centre pixel, and so the label, is never pasted over: the network learns that ground across a field's edge says
    little about the pixel. (CutMix, arXiv:1905.04899, without mixing labels.)

    Draws from torch's global generator, which `train.Batches` seeds batch by batch.

    Args:
        chance: probability of pasting into a patch.
    """

    def __init__(self, chance: float = 0.5) -> None:
        self.chance = chance

    def collate(self, samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Pairs (patch, label) to an augmented batch (B, C, P, P), channels last, and its labels (B,)."""
        patches, labels = zip(*samples, strict=True)
        return self(torch.stack(patches)), torch.tensor(labels)

    def __call__(self, x_BCPP: Tensor) -> Tensor:
        """Patches (B, C, P, P) to the same shape."""
        batch, channels, side, _ = x_BCPP.shape
        pixels = x_BCPP.permute(0, 2, 3, 1).reshape(batch, side * side, channels)
        order = _symmetries(side)[torch.randint(8, (batch,))]  # (B, P P)
        pixels = pixels.gather(1, order[..., None].expand(-1, -1, channels))
        foreign = self._half_planes(batch, side)
        pixels = torch.where(foreign[..., None], pixels[torch.randperm(batch)], pixels)
        return pixels.reshape(batch, side, side, channels).permute(0, 3, 1, 2)

    def _half_planes(self, batch: int, side: int) -> Tensor:
        """(B, P P) bool: pixels beyond a line at a random angle and distance from the centre."""
        half = side // 2
        line = torch.arange(-half, half + 1.0)
        row, column = (axis.flatten() for axis in torch.meshgrid(line, line, indexing="ij"))
        angle = torch.rand(batch, 1) * 2 * math.pi
        distance = 0.7 + torch.rand(batch, 1) * (half - 0.5)
        beyond = torch.cos(angle) * row + torch.sin(angle) * column > distance
        return beyond & (torch.rand(batch, 1) < self.chance)


def _symmetries(side: int) -> Tensor:
    """(8, P P): the source of each pixel of a rotated or flipped square."""
    grid = torch.arange(side * side).reshape(side, side)
    turned = [grid.rot90(quarter) for quarter in range(4)]
    return torch.stack([g.flatten() for turn in turned for g in (turn, turn.flip(0))])
