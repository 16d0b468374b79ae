"""Geometry of boxes (left, top, right, bottom): positions of a feature map, overlaps, and non-maximum suppression.

In plain torch, because torchvision has no CPU wheel on PyPI.
"""

import torch
from torch import Tensor


def places(height: int, width: int, stride: int, like: Tensor) -> Tensor:
    """Return the middle of every position of a feature map, in pixels (FCOS, arXiv:1904.01355, section 3.1).

    Args:
        height: of the feature map.
        width: of the feature map.
        stride: pixels between two positions.
        like: gives the dtype and the device.

    Returns:
        (height * width, 2): across, down; row by row.
    """
    down, across = (stride * (torch.arange(n, dtype=like.dtype, device=like.device) + 0.5) for n in (height, width))
    return torch.stack([across.repeat(height), down.repeat_interleave(width)], 1)


def sides(logs: Tensor, stride: int) -> Tensor:
    """Convert a detector's logarithms of distances, in strides, to pixels; clamped so that none overflows."""
    return logs.clamp(max=8).exp() * stride


def from_sides(places_P2: Tensor, away: Tensor) -> Tensor:
    """Return boxes around places, from the distances to their sides.

    Args:
        places_P2: (P, 2).
        away: (..., P, 4) left, top, right, bottom.

    Returns:
        (..., P, 4).
    """
    return torch.cat([places_P2 - away[..., :2], places_P2 + away[..., 2:]], -1)


def area(boxes: Tensor) -> Tensor:
    """Return the area of boxes, (..., 4) to (...); 0 for reversed ones."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Return the intersection over union, broadcast: (..., 4) and (..., 4) to (...). 0 where both areas are 0."""
    both, either = _both_and_either(one, other)
    return both / either.clamp(min=torch.finfo(either.dtype).tiny)


def generalized_overlap(one: Tensor, other: Tensor) -> Tensor:
    """Return the overlap minus the uncovered share of the box around both, -1 to 1 (GIoU, arXiv:1902.09630)."""
    both, either = _both_and_either(one, other)
    least, most = torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:])
    around = area(torch.cat([least, most], -1))
    tiny = torch.finfo(either.dtype).tiny
    return both / either.clamp(min=tiny) - (around - either) / around.clamp(min=tiny)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, most: float) -> Tensor:
    """Non-maximum suppression: drop boxes that overlap a better one of their class by more than `most`.

    Args:
        boxes: (N, 4).
        scores: (N,).
        labels: (N,) int64: classes do not suppress each other.
        most: the largest overlap that two boxes of a class may have.

    Returns:
        Indices (n,) of the boxes that are left, best first.
    """
    order = scores.argsort(descending=True, stable=True)
    sorted_, named = boxes[order], labels[order]
    worse = (overlap(sorted_[:, None], sorted_) > most) & (named[:, None] == named)
    worse = worse.triu(diagonal=1).cpu()
    stays = torch.ones(len(order), dtype=torch.bool)
    for k in range(len(order)):
        if stays[k]:
            stays &= ~worse[k]
    return order[stays.to(order.device)]


def _both_and_either(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    least, most = torch.maximum(one[..., :2], other[..., :2]), torch.minimum(one[..., 2:], other[..., 2:])
    both = (most - least).clamp(min=0).prod(-1)
    return both, area(one) + area(other) - both
