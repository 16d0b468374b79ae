"""Classification as a task: its objective, its score, what is drawn."""

import math

import pytest
import torch
from torch import nn

from dynanet import CostModel, record
from dynanet.core.errors import ConfigError, DataError
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.tasks import Classification, TrainingOptions
from dynanet.train.objectives import CrossEntropy, MultiExit

TASK = Classification()


class Says(nn.Module):
    """Answers the class that its input names, one of three."""

    def forward(self, x):
        return nn.functional.one_hot(x[:, 0].long(), 3).float()


def exits():
    torch.manual_seed(0)
    return EarlyExit([nn.Linear(4, 4) for _ in range(3)], [nn.Linear(4, 3) for _ in range(3)])


def score(*batches):
    pairs = [(torch.tensor(said).float()[:, None], torch.tensor(truth)) for said, truth in batches]
    return TASK.score(Says(), pairs, CostModel(Says(), torch.zeros(1, 1)))


def test_figures_by_hand_whatever_the_batches():
    whole = score(([0, 0, 1, 1, 0], [0, 0, 0, 1, 1]))
    assert whole.figures == {"accuracy": pytest.approx(3 / 5)}
    assert whole.by_class["accuracy"][:2] == pytest.approx([2 / 3, 1 / 2])
    assert math.isnan(whole.by_class["accuracy"][2]), "a class without a sample"
    parts = score(([0, 0], [0, 0]), ([1, 1, 0], [0, 1, 1]))
    assert parts.figures == whole.figures and parts.by_class["accuracy"][:2] == whole.by_class["accuracy"][:2]


def test_what_cannot_be_scored():
    with pytest.raises(DataError, match="no samples to score"):
        score()
    for label in (-1, 3):
        with pytest.raises(DataError, match="labels from .* for a model of 3 classes; give indices from 0 to 2"):
            score(([0, 1], [0, label]))


def test_macs_are_those_really_spent():
    model, x = exits().eval(), torch.randn(50, 4)
    cost = CostModel(model, x[:1])
    y = torch.zeros(50, dtype=torch.long)
    full = TASK.score(model, [(x, y)], cost)
    assert full.macs == pytest.approx(cost.full)
    model.thresholds.fill_(0.4)
    with torch.no_grad(), record(model) as trace:
        model(x)
    early = TASK.score(model, [(x[:20], y[:20]), (x[20:], y[20:])], cost)
    assert early.macs == pytest.approx(float(cost.spent(trace).mean())) and early.macs < full.macs


def test_every_exit_is_trained_with_its_weight():
    model, x, y = exits(), torch.randn(6, 4), torch.arange(6) % 3
    with record(model) as trace:
        answer = model(x)
    losses = torch.stack([nn.functional.cross_entropy(each, y) for each in trace.exits(6)])
    equal = TASK.objective(model, TrainingOptions())(answer, y, trace)
    last = TASK.objective(model, TrainingOptions(exit_weights=[0, 0, 1]))(answer, y, trace)
    assert torch.allclose(equal, losses.mean()) and torch.allclose(last, losses[-1])
    taught = TASK.objective(model, TrainingOptions(distill=0.5, label_smoothing=0.1))
    assert isinstance(taught, MultiExit) and (taught.distill, taught.label_smoothing) == (0.5, 0.1)


def test_a_network_with_one_answer_has_one_loss():
    assert TASK.objective(nn.Linear(4, 3), TrainingOptions(label_smoothing=0.1)) == CrossEntropy(0.1)
    with pytest.raises(ConfigError, match="no position of this model halts"):
        TASK.objective(nn.Linear(4, 3), TrainingOptions(ponder=1.0))


def test_the_true_class_is_said_where_it_is_another():
    answer, names = torch.tensor([[0.1, 0.7, 0.2]]), ["cat", "dog", "owl"]
    assert TASK.overlay(answer, torch.tensor([1]), names, (4, 4)).caption == "dog"
    assert TASK.overlay(answer, torch.tensor([2]), names, (4, 4)).caption == "dog (is owl)"
