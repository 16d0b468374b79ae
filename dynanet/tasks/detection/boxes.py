"""Boxes (left, top, right, bottom): where a feature map's positions lie, overlaps, and the best of those that overlap.

Plain torch, because torchvision has no CPU wheel on PyPI.
"""

import torch
from torch import Tensor


def places(height: int, width: int, stride: int, like: Tensor) -> Tensor:
    """The middle of every position of a feature map, in pixels of the image (FCOS, arXiv:1904.01355, section 3.1).

    Returns:
        (height * width, 2): across, down; row by row.
    """
    down, across = (stride * (torch.arange(n, dtype=like.dtype, device=like.device) + 0.5) for n in (height, width))
    return torch.stack([across.repeat(height), down.repeat_interleave(width)], 1)


def sides(logs: Tensor, stride: int) -> Tensor:
    """Distances to a box's sides in pixels, from a detector's logarithms of them in strides. None overflows."""
    return logs.clamp(max=8).exp() * stride


def from_sides(places_P2: Tensor, away: Tensor) -> Tensor:
    """Boxes around places from their distances to the left, top, right and bottom.

    Args:
        places_P2: (P, 2).
        away: (..., P, 4) left, top, right, bottom.

    Returns:
        (..., P, 4).
    """
    return torch.cat([places_P2 - away[..., :2], places_P2 + away[..., 2:]], -1)


def area(boxes: Tensor) -> Tensor:
    """(..., 4) to (...); 0 for a box without inside."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union, broadcast: (..., 4) and (..., 4) to (...). 0 where neither has an inside."""
    both, either = _both_and_either(one, other)
    return both / either.clamp(min=torch.finfo(either.dtype).tiny)


def generalized_overlap(one: Tensor, other: Tensor) -> Tensor:
    """Overlap minus the share of the smallest box around both that neither covers: -1 to 1 (GIoU, arXiv:1902.09630)."""
    both, either = _both_and_either(one, other)
    least, most = torch.minimum(one[..., :2], other[..., :2]), torch.maximum(one[..., 2:], other[..., 2:])
    around = area(torch.cat([least, most], -1))
    tiny = torch.finfo(either.dtype).tiny
    return both / either.clamp(min=tiny) - (around - either) / around.clamp(min=tiny)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, most: float) -> Tensor:
    """Which boxes stay, best first: one that overlaps a better one of its class by more than `most` does not.

    Args:
        boxes: (N, 4).
        scores: (N,).
        labels: (N,) int64: classes do not suppress each other.
        most: the largest overlap that two boxes of a class may have.

    Returns:
        Indices (n,), by falling score.
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
