"""What tasks share: the terms of layers, their schedules, and what a batch spent."""

import pytest
import torch
from torch import nn

from dynanet import CostModel, record
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError
from dynanet.core.trace import Trace
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.tasks.classification import Classification
from dynanet.tasks.task import Overlay, Task, TrainingOptions, finish_training, schedules, spent_macs, with_layer_terms
from dynanet.train.objectives import CrossEntropy
from tests.tasks.keeps import Keeps


def skipping(*shares):
    torch.manual_seed(0)
    return nn.Sequential(*(LayerSkip(nn.Linear(4, 4), Keeps(share)) for share in shares))


def test_a_model_without_layers_that_decide_adds_nothing():
    loss = CrossEntropy()
    assert with_layer_terms(loss, nn.Linear(4, 4), TrainingOptions()) is loss
    assert with_layer_terms(loss, skipping(0.5), TrainingOptions()) is loss, "no rate was asked for"


def test_every_skippable_layer_is_to_run_at_the_rate():
    model, x, y = skipping(1.0, 0.25), torch.randn(8, 4), torch.arange(8) % 4
    with record(model) as trace:
        answer = model(x)
    plain, rated = CrossEntropy(), with_layer_terms(CrossEntropy(), model, TrainingOptions(rate=0.5))
    extra = rated(answer, y, trace) - plain(answer, y, trace)
    assert extra.item() == pytest.approx(4 * (0.5**2 + 0.25**2), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (TrainingOptions(rate=0.5), "recipe.rate is 0.5, but no layer of this model is skipped; leave it out"),
        (TrainingOptions(ponder=0.1), "recipe.ponder is 0.1, but no position of this model halts; leave it at 0"),
    ],
)
def test_options_for_layers_that_are_not_there_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        with_layer_terms(CrossEntropy(), nn.Linear(4, 4), options)


def test_where_nothing_decides_every_sample_costs_the_whole():
    model = nn.Linear(4, 3)
    spent = spent_macs(Trace({}), CostModel(model, torch.zeros(1, 4)), 5)
    assert spent.tolist() == [12.0] * 5 and spent.dtype == torch.float64


def test_where_something_decides_samples_cost_what_ran():
    model, x = skipping(0.25).eval(), torch.randn(8, 4)
    cost = CostModel(model, x[:1])
    with torch.no_grad(), record(model) as trace:
        model(x)
    assert spent_macs(trace, cost, 8).tolist() == [16.0] * 2 + [0.0] * 6


class Warming(Dynamic):
    """A layer with a setting that training changes."""

    heat = 0.0

    def schedules(self):
        return [lambda progress: setattr(self, "heat", progress)]

    def finish_training(self):
        self.heat = -1.0


def test_settings_of_all_layers_are_changed_and_put_back():
    model = nn.Sequential(Warming(), nn.Sequential(nn.ReLU(), Warming()))
    layers = (model[0], model[1][1])
    found = schedules(model)
    for setting in found:
        setting(0.5)
    assert len(found) == 2 and [each.heat for each in layers] == [0.5, 0.5]
    finish_training(model)
    assert [each.heat for each in layers] == [-1.0, -1.0]


def test_a_task_says_how_it_is_trained_and_scored():
    with pytest.raises(TypeError, match="abstract"):
        Task()
    task = Classification()
    assert task.ignore is None and task.true_boxes(torch.zeros(3)) == []
    assert Task.overlay(task, torch.zeros(1, 2), torch.zeros(1), ["a", "b"], (2, 2)).caption == Overlay().caption == ""
