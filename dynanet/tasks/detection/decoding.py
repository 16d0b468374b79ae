"""Decode the answer of an anchor-free detector into boxes."""

from typing import NamedTuple

import torch
from torch import Tensor

from dynanet.core.errors import ConfigError, InputError
from dynanet.tasks.detection.boxes import from_sides, places, sides, suppress


class Detections(NamedTuple):
    """The boxes found in an image, best first; N may be 0.

    Attributes:
        boxes: (N, 4) left, top, right, bottom in pixels of the image, inside it.
        labels: (N,) int64 classes.
        scores: (N,) from 0 to 1.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor


def decode(
    answer: Tensor,
    size: tuple[int, int],
    *,
    stride: int = 8,
    least: float = 0.05,
    overlap: float = 0.6,
    most: int = 100,
    candidates: int = 400,
) -> list[Detections]:
    """Decode the boxes of every image.

    The score of a box is its class probability times its centreness (FCOS, arXiv:1904.01355, section 3).

    Args:
        answer: (B, classes + 5, h, w): class logits, logarithms of the four sides in strides, a centreness logit.
        size: (height, width) of the images: boxes are clipped to it.
        stride: of the feature map.
        least: the lowest score of a box.
        overlap: the largest overlap of two boxes of a class.
        most: boxes per image.
        candidates: number of best scores to consider before overlapping boxes are suppressed.

    Raises:
        InputError: an answer of another shape.
        ConfigError: a threshold outside [0, 1], or counts below 1.
    """
    if answer.dim() != 4 or answer.shape[1] < 6:
        raise InputError(
            f"the answer has shape {tuple(answer.shape)}; expected (B, classes + 5, h, w) with at least one class"
        )
    if not (0 <= least <= 1 and 0 <= overlap <= 1) or min(most, candidates, stride) < 1:
        raise ConfigError(
            f"least = {least}, overlap = {overlap}, most = {most}, candidates = {candidates}, stride = {stride}; "
            f"expected thresholds from 0 to 1 and counts of at least 1"
        )
    batch, channels, height, width = answer.shape
    classes = channels - 5
    answer = answer.detach().float().flatten(2).transpose(1, 2)  # (B, P, classes + 5)
    scores = answer[..., :classes].sigmoid() * answer[..., -1:].sigmoid()
    boxes = from_sides(places(height, width, stride, answer), sides(answer[..., -5:-1], stride))
    limit = torch.tensor([size[1], size[0], size[1], size[0]], dtype=boxes.dtype, device=boxes.device)
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    return [_best(boxes[b], scores[b], least, overlap, most, candidates) for b in range(batch)]


def _best(boxes: Tensor, scores: Tensor, least: float, overlap: float, most: int, candidates: int) -> Detections:
    classes = scores.shape[1]
    best, index = scores.flatten().topk(min(candidates, scores.numel()))
    index = index[best >= least]
    found = Detections(boxes[index // classes], index % classes, scores.flatten()[index])
    found = _taken(found, (found.boxes[:, 2:] > found.boxes[:, :2]).all(1))
    return _taken(found, suppress(found.boxes, found.scores, found.labels, overlap)[:most])


def _taken(found: Detections, rows: Tensor) -> Detections:
    return Detections(found.boxes[rows], found.labels[rows], found.scores[rows])
