"""Maps of compute over the positions of an image, and their relation to boxes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dynanet.core.errors import InputError, StructureError
from dynanet.core.trace import Trace


def places(trace: Trace, size: tuple[int, int]) -> list[str]:
    """The layers that decided about positions, tiles or patch tokens of an image of this size."""
    found = [call.name for call in trace.calls if _units(call.keep, size) is not None]
    return list(dict.fromkeys(found))


def units_per_position(trace: Trace, size: tuple[int, int]) -> Tensor:
    """How many skippable units ran for every pixel, summed over the layers that decide about positions.

    Every pixel takes the number of the position, tile or patch it lies in; a unit that is computed on several sets of
    positions counts where its answer was needed. Tokens count if they are the patches of the image, row by row, with or
    without a class token in front.

    Args:
        trace: of one pass, dense or sparse.
        size: (height, width) of the map.

    Returns:
        (B, height, width).

    Raises:
        StructureError: no layer decided about positions.
    """
    total = None
    for call in trace.calls:
        units = _units(call.keep.detach(), size)
        if units is None:  # others decide about samples or steps
            continue
        wide = functional.interpolate(units.float()[:, None], size=size, mode="nearest-exact")[:, 0]
        total = wide if total is None else total + wide
    if total is None:
        raise StructureError(f"no layer of this trace decided about positions; those that decided are {trace.keys()}")
    return total


def _units(keep: Tensor, size: tuple[int, int]) -> Tensor | None:
    """How many units a call ran at every position, (B, down, across); None for other kinds of calls."""
    if keep.dim() == 4:  # (B, down, across, units)
        return keep[..., -1]
    if keep.dim() != 3:
        return None
    for first in (1, 0):  # (B, tokens, units), a class token first or not
        patches = keep.shape[1] - first
        down = math.isqrt(patches * size[0] // size[1])
        if down and patches % down == 0 and down * size[1] == patches // down * size[0]:
            return keep[:, first:].sum(-1).unflatten(1, (down, patches // down))
    return None


class BesideBoxes(NamedTuple):
    """Compute inside and outside the boxes.

    Attributes:
        inside: the mean over pixels in a box; NaN without any.
        outside: the mean over the other pixels; NaN without any.
        correlation: point-biserial, of every pixel's compute with whether it lies in a box; NaN where one of them does
            not vary.
    """

    inside: float
    outside: float
    correlation: float


def beside_boxes(compute: Tensor, boxes: Sequence[Tensor]) -> BesideBoxes:
    """Compare compute inside and outside the boxes, over the pixels of all images together.

    Args:
        compute: (B, H, W), for example of `units_per_position`.
        boxes: per image (N, 4) left, top, right, bottom in pixels of the map; N may be 0.

    Raises:
        InputError: another number of images in `boxes`.
    """
    if len(boxes) != len(compute):
        raise InputError(f"expected the boxes of {len(compute)} images, got those of {len(boxes)}")
    covered = torch.stack([cover(each, tuple(compute.shape[1:])) for each in boxes]).flatten() if len(boxes) else None
    if covered is None:
        return BesideBoxes(float("nan"), float("nan"), float("nan"))
    values = compute.detach().double().flatten().cpu()
    inside, outside = values[covered], values[~covered]
    spread = values.std(correction=0)
    if not len(inside) or not len(outside) or not spread > 0:
        correlation = float("nan")
    else:
        share = covered.double().mean()
        correlation = float((inside.mean() - outside.mean()) / spread * (share * (1 - share)).sqrt())
    return BesideBoxes(_mean(inside), _mean(outside), correlation)


def cover(boxes: Tensor, size: tuple[int, ...]) -> Tensor:
    """The pixels whose centre lies in one of the boxes (N, 4), bool (H, W)."""
    height, width = size
    down = torch.arange(height) + 0.5
    across = torch.arange(width) + 0.5
    left, top, right, bottom = boxes.cpu().float()[:, :, None].unbind(1)
    rows = (top <= down) & (down < bottom)
    columns = (left <= across) & (across < right)
    return (rows[:, :, None] & columns[:, None, :]).any(0)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")
