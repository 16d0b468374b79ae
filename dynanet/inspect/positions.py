"""Where in an image the compute went, and whether it went where the boxes are."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dynanet.core.errors import InputError, StructureError
from dynanet.core.trace import Trace


def units_per_position(trace: Trace, size: tuple[int, int]) -> Tensor:
    """How many of the units that positions or tiles may skip ran for every pixel, summed over the layers.

    Pixels take the number of the position they lie in; a unit that is computed on several sets of positions counts
    where its answer was wanted.

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
        if call.keep.dim() != 4:  # (B, down, across, units): others decide about samples, tokens, steps
            continue
        keep = call.keep.detach()[..., -1].float()
        wide = functional.interpolate(keep[:, None], size=size, mode="nearest-exact")[:, 0]
        total = wide if total is None else total + wide
    if total is None:
        raise StructureError(f"no layer of this trace decided about positions; heard were {trace.keys()}")
    return total


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
    """Over all pixels of all images together.

    Args:
        compute: (B, H, W), of `units_per_position` say.
        boxes: per image (N, 4) left, top, right, bottom in pixels of the map; N may be 0.

    Raises:
        InputError: not boxes for each image.
    """
    if len(boxes) != len(compute):
        raise InputError(f"a map of {len(compute)} images came with the boxes of {len(boxes)}; give one for each")
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
    """Which pixels have their middle in a box: (N, 4) to bool (H, W)."""
    height, width = size
    down, across = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    left, top, right, bottom = boxes.cpu().float()[:, :, None].unbind(1)
    rows, columns = (top <= down) & (down < bottom), (left <= across) & (across < right)
    return (rows[:, :, None] & columns[:, None, :]).any(0)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")
