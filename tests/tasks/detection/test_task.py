"""Difficult boxes go through loader, batch and score: neither missed nor wrong, and not learned from."""

import math

import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.errors import DataError
from dynanet.data.detection import DetectionTensors, Normalize, RandomResizedFlipBoxes
from dynanet.data.voc import Boxes
from dynanet.tasks.detection.loss import DetectionLoss
from dynanet.tasks.detection.task import Detection
from dynanet.train.batches import Batches

pytest.importorskip("pycocotools")
EASY, DIFFICULT = (8.0, 8.0, 24.0, 24.0), (32.0, 32.0, 56.0, 56.0)


class FindsBoth(nn.Module):
    """(B, 1 + 5, 8, 8): both boxes, the difficult one surer."""

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(3, 6, 8, 8)

    def forward(self, x):
        answer = torch.full_like(self.map(x), -12.0)
        for box, score in ((EASY, 3.0), (DIFFICULT, 9.0)):
            column, row = (int((box[k] + box[k + 2]) // 16) for k in (0, 1))
            x_middle, y_middle = 8 * column + 4, 8 * row + 4
            sides = (x_middle - box[0], y_middle - box[1], box[2] - x_middle, box[3] - y_middle)
            answer[:, 0, row, column] = score
            answer[:, 1:5, row, column] = torch.tensor([math.log(side / 8) for side in sides])
            answer[:, 5, row, column] = 12.0
        return answer


def data(*difficult):
    both = Boxes(torch.tensor([EASY, DIFFICULT]), torch.tensor([0, 0]), torch.tensor(difficult))
    return DetectionTensors(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [both, both], ["car"])


def scored(*difficult):
    model = FindsBoth().eval()
    batches = Batches(data(*difficult), 2, collate=Normalize([0.5] * 3, [0.5] * 3).collate)
    return Detection(("car",)).score(model, batches, CostModel(model, torch.zeros(1, 3, 64, 64))).figures["map_50"]


def test_found_difficult_boxes_are_not_wrong():
    assert scored(False, True) == pytest.approx(1)
    assert scored(True, False) == pytest.approx(1)
    with pytest.raises(DataError, match="that is not difficult"):
        scored(True, True)


@pytest.mark.parametrize("form", [Normalize, RandomResizedFlipBoxes])
def test_difficult_boxes_are_not_learned_from(form):
    torch.manual_seed(0)
    set_ = data(False, True)
    _, y = form([0.5] * 3, [0.5] * 3).collate([set_[0], set_[1]])
    alone = y.clone()
    alone[y[..., 0] < 0] = torch.tensor([-1.0, 0, 0, 0, 0])
    answer = torch.randn(2, 6, 8, 8)
    assert (y[..., 0] == -2).any() or form is RandomResizedFlipBoxes
    torch.testing.assert_close(DetectionLoss()(answer, y, None), DetectionLoss()(answer, alone, None))
