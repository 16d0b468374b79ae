"""COCO's average precision of detections, computed by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynanet.core.errors import DataError, require
from dynanet.data.voc import Boxes
from dynanet.tasks.detection.decoding import Detections


@dataclass(frozen=True)
class Precision:
    """Average precision of boxes; NaN where there were no true boxes.

    Attributes:
        mean: mAP: the mean over classes and over overlaps of 0.50, 0.55, ... 0.95.
        at_50: mAP at an overlap of 0.50.
        at_75: mAP at an overlap of 0.75.
        classes: of every class, the mean over the overlaps.
    """

    mean: float
    at_50: float
    at_75: float
    classes: dict[str, float]


def average_precision(found: Sequence[Detections], truth: Sequence[Boxes], classes: Sequence[str]) -> Precision:
    """Score the detections of a set of images (Lin et al. 2014, arXiv:1405.0312; 100 detections per image).

    Difficult boxes count neither as found nor as missed, as crowds do in COCO.

    Args:
        found: per image.
        truth: per image, in the same pixels.
        classes: the classes' names.

    Raises:
        DataError: detections and boxes of different numbers of images, or a label outside the classes.
        MissingExtraError: pycocotools is not installed.
    """
    if len(found) != len(truth):
        raise DataError(f"detections of {len(found)} images came for the boxes of {len(truth)}; give one for each")
    for labels in (each.labels for several in (found, truth) for each in several):
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise DataError(
                f"a label of {int(labels.min())} to {int(labels.max())} among detections or boxes; expected "
                f"0 to {len(classes) - 1}, of the classes {', '.join(classes)}"
            )
    coco, evaluation = require("pycocotools.coco", "detection"), require("pycocotools.cocoeval", "detection")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        wanted, given = coco.COCO(), coco.COCO()
        wanted.dataset = _dataset(truth, classes, [{"iscrowd": d} for b in truth for d in b.difficult.int().tolist()])
        given.dataset = _dataset(found, classes, [{"score": s} for d in found for s in d.scores.tolist()])
        wanted.createIndex()
        given.createIndex()
        score = evaluation.COCOeval(wanted, given, "bbox")
        score.evaluate()
        score.accumulate()
    precision = score.eval["precision"][:, :, :, 0, -1]  # overlaps x recalls x classes, of boxes of any area
    overlaps = score.params.iouThrs
    return Precision(
        _mean(precision),
        _mean(precision[np.isclose(overlaps, 0.5)]),
        _mean(precision[np.isclose(overlaps, 0.75)]),
        {name: _mean(precision[..., k]) for k, name in enumerate(classes)},
    )


def _dataset(images: Sequence[Detections | Boxes], classes: Sequence[str], more: list[dict]) -> dict:
    """Images and boxes in COCO's format: left, top, width, height."""
    annotations: list[dict] = []
    for k, each in enumerate(images):
        for box, label in zip(each.boxes.tolist(), each.labels.tolist(), strict=True):
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            annotations.append({
                "id": len(annotations) + 1, "image_id": k, "category_id": label, "bbox": sides,
                "area": sides[2] * sides[3], "iscrowd": 0,
            } | more[len(annotations)])  # fmt: skip
    return {
        "info": {},
        "images": [{"id": k} for k in range(len(images))],
        "categories": [{"id": k, "name": name} for k, name in enumerate(classes)],
        "annotations": annotations,
    }


def _mean(precision: np.ndarray) -> float:
    """The mean over entries that have a value; -1 marks those without true boxes."""
    there = precision[precision > -1]
    return float(there.mean()) if there.size else float("nan")
