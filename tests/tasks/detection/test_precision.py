import math

import pytest
import torch

from dynanet.core.errors import DataError, MissingExtraError
from dynanet.data.voc import Boxes
from dynanet.tasks.detection.decoding import Detections
from dynanet.tasks.detection.precision import average_precision

pytest.importorskip("pycocotools")
CLASSES = ("cat", "dog")


def truth(*rows, difficult=()):
    t = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    hard = torch.tensor([k in difficult for k in range(len(t))], dtype=torch.bool)
    return Boxes(t[:, 1:], t[:, 0].long(), hard)


def found(*rows):
    """label, left, top, right, bottom, score."""
    t = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(t[:, 1:5], t[:, 0].long(), t[:, 5])


A, B = [0, 0, 0, 40, 40], [1, 10, 10, 60, 50]


def test_all_found():
    score = average_precision([found([*A, 0.9], [*B, 0.8]), found()], [truth(A, B), truth()], CLASSES)
    assert (score.mean, score.at_50, score.at_75) == pytest.approx((1, 1, 1))
    assert score.classes == pytest.approx({"cat": 1, "dog": 1})


def test_nothing_found_anywhere():
    score = average_precision([found(), found()], [truth(A), truth(B)], CLASSES)
    assert score.mean == 0 and score.classes == {"cat": 0, "dog": 0}


def test_nothing_to_find():
    score = average_precision([found([*A, 0.9])], [truth()], CLASSES)
    assert math.isnan(score.mean) and math.isnan(score.at_50)
    score = average_precision([found([*A, 0.9])], [truth(A)], CLASSES)
    assert score.mean == pytest.approx(1) and math.isnan(score.classes["dog"])


def test_by_hand():
    """Two cats. The best detection is wrong, the second finds one: precision 1/2 at recalls up to 1/2."""
    wrong, right = [0, 100, 100, 140, 140, 0.9], [0, 0, 0, 40, 40, 0.8]
    score = average_precision([found(wrong, right)], [truth(A, [0, 200, 0, 240, 40])], CLASSES)
    assert score.at_50 == pytest.approx(51 / 101 / 2)  # 51 of the 101 recalls
    # An overlap of 0.8 (32 of 40 columns) counts at 7 of the 10 thresholds.
    score = average_precision([found([0, 0, 0, 32, 40, 0.8])], [truth(A)], CLASSES)
    assert (score.at_50, score.at_75) == pytest.approx((1, 1)) and score.mean == pytest.approx(0.7)


def test_difficult_boxes_count_for_nothing():
    score = average_precision([found([*A, 0.9])], [truth(A, [0, 100, 0, 140, 40], difficult=(1,))], CLASSES)
    assert score.mean == pytest.approx(1)
    twice = found([*A, 0.5], [0, 100, 0, 140, 40, 0.9])
    score = average_precision([twice], [truth(A, [0, 100, 0, 140, 40], difficult=(1,))], CLASSES)
    assert score.mean == pytest.approx(1)


def test_what_cannot_be_scored(monkeypatch):
    with pytest.raises(DataError, match="detections of 1 images"):
        average_precision([found()], [], CLASSES)
    with pytest.raises(DataError, match="a label of 2 to 2"):
        average_precision([found()], [truth([2, 0, 0, 1, 1])], CLASSES)
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.coco", None)
    with pytest.raises(MissingExtraError, match="dynanet\\[detection\\]"):
        average_precision([found()], [truth(A)], CLASSES)
