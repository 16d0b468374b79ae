"""Segmentation as a task: its objective, its schedule, its score."""

import math

import pytest
import torch
from torch import nn

from dynanet import CostModel, record
from dynanet.core.errors import ConfigError, DataError
from dynanet.core.trace import Trace
from dynanet.mechanisms.pixel_cascade import PixelCascade, PixelCascadeLoss, roaming_thresholds
from dynanet.mechanisms.point_refine import PointHead, PointLoss, PointRefine
from dynanet.tasks import PixelCrossEntropy, Segmentation, TrainingOptions
from dynanet.tasks.task import finish_training, schedules

VOID = 7
TASK = Segmentation(3, VOID)


class Says(nn.Module):
    """Answers the labels that its input holds in the first channel."""

    def forward(self, x):
        return nn.functional.one_hot(x[:, 0].long(), 3).permute(0, 3, 1, 2).float()


def cascade():
    torch.manual_seed(0)
    exits = [nn.Conv2d(4, 3, 1) for _ in range(3)]
    return PixelCascade(nn.Conv2d(3, 4, 3, padding=1), [[nn.Conv2d(4, 4, 3, padding=1)] for _ in range(2)], exits)


def score(found, truth):
    found, truth = torch.tensor(found), torch.tensor(truth)
    x = found[:, None].float()
    return TASK.score(Says(), [(x[:1], truth[:1]), (x[1:], truth[1:])], CostModel(Says(), x[:1]))


def test_figures_by_hand():
    """Over all images together, void left out: class 0 3 of 4, class 1 2 of 3, class 2 0 of 1 (wrongly found)."""
    found = [[[0, 0, 0, 1]], [[1, 2, 0, 2]]]
    truth = [[[0, 0, 1, 1]], [[1, 0, 0, VOID]]]
    # class 0: found and true 3, found or true 5; class 1: 2 of 3; class 2: 0 of 1
    done = score(found, truth)
    assert done.by_class["iou"] == pytest.approx([3 / 5, 2 / 3, 0])
    assert done.figures == {"miou": pytest.approx((3 / 5 + 2 / 3 + 0) / 3), "pixel_accuracy": pytest.approx(5 / 7)}


def test_a_class_that_is_nowhere_counts_nowhere():
    done = score([[[0, 1]], [[0, 1]]], [[[0, 1]], [[1, 1]]])
    assert math.isnan(done.by_class["iou"][2])
    assert done.figures["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_only_void_cannot_be_scored():
    with pytest.raises(DataError, match="all pixels of 2 images are void .7."):
        score([[[0, 1]], [[0, 1]]], [[[VOID, VOID]], [[VOID, VOID]]])


def test_masks_of_another_size_are_told():
    with pytest.raises(DataError, match="a label per pixel"):
        TASK.score(Says(), [(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 3).long())], None)
    with pytest.raises(ConfigError, match="one label per pixel"):
        PixelCrossEntropy(VOID)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 3).long(), Trace({}))


@pytest.mark.parametrize("void", [-1, 3, VOID, 255])
@pytest.mark.parametrize("strange", [-2, 3, 6, 300])
def test_labels_beyond_the_classes_are_named(void, strange):
    y = torch.tensor([[[0, 1], [void, 2]]])
    refine = PointRefine(Fine(), PointHead(4, 3, hidden=4), points=2).eval()
    losses = [
        (nn.Conv2d(3, 3, 1), PixelCrossEntropy(void)),
        (cascade(), PixelCascadeLoss(void)),
        (refine, PointLoss(void)),
    ]
    x = torch.randn(1, 3, 2, 2)
    for model, loss in losses:
        with record(model) as trace:
            answer = model(x)
        assert loss(answer, y, trace).isfinite()
        if strange == void:
            continue
        with pytest.raises(DataError, match=f"of labels holds {strange}; expected classes from 0 to 2, or {void}"):
            loss(answer, y.where(y != 1, strange), trace)
    task, x = Segmentation(3, void), torch.zeros(1, 1, 2, 2)
    cost = CostModel(Says(), x)
    assert task.score(Says(), [(x, y)], cost).figures["pixel_accuracy"] == pytest.approx(1 / 3)
    if strange != void:
        with pytest.raises(DataError, match=f"holds {strange}; expected"):
            task.score(Says(), [(x, y.where(y != 1, strange))], cost)


class Fine(nn.Module):
    """Fine features and coarse logits."""

    def forward(self, x):
        return x.repeat(1, 2, 1, 1)[:, :4], x[:, :, ::2, ::2]


def test_objectives():
    assert isinstance(TASK.objective(cascade(), TrainingOptions()), PixelCascadeLoss)
    static = TASK.objective(nn.Conv2d(3, 3, 1), TrainingOptions())
    logits, y = torch.randn(2, 3, 2, 2, requires_grad=True), torch.tensor([[[0, 1], [VOID, 2]], [[VOID] * 2] * 2])
    loss = static(logits, y, Trace({}))
    known = y != VOID
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.permute(0, 2, 3, 1)[known], y[known]))
    nothing = static(logits, torch.full_like(y, VOID), Trace({}))
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()
    with pytest.raises(ConfigError, match="are for classification"):
        TASK.objective(cascade(), TrainingOptions(label_smoothing=0.1))


def test_thresholds_roam_in_the_second_part_and_are_put_back():
    model = cascade()
    assert len(schedules(model)) == 1 and not schedules(nn.Conv2d(3, 3, 1))
    roam = roaming_thresholds(model, probabilities=(0.8, 0.99), begin=0.5)
    roam(0.49)
    assert (model.thresholds == torch.inf).all()
    drawn = []
    torch.manual_seed(0)
    for _ in range(200):
        roam(0.5)
        drawn.append(model.thresholds.clone())
    drawn = torch.stack(drawn)
    finite = drawn[drawn.isfinite()].sigmoid()
    assert 0.15 < drawn.isinf().float().mean() < 0.35
    assert finite.min() >= 0.8 - 1e-6 and finite.max() <= 0.99 + 1e-6 and finite.std() > 0.02
    finish_training(model)
    assert (model.thresholds == torch.inf).all()
    with pytest.raises(ConfigError, match="between 0 and 1 that do not fall"):
        roaming_thresholds(model, probabilities=(0.5, 1.0))
