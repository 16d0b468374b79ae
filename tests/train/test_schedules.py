import pytest
import torch
from torch import nn

from dynanet import train
from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.errors import ConfigError
from tests.train.train_toys import toy


@pytest.mark.parametrize("schedule", [train.linear, train.exponential])
def test_schedules_go_from_end_to_end_and_stay(schedule):
    value = schedule(4.0, 1.0, share=0.5)
    assert value(0.0) == 4.0 and value(0.5) == pytest.approx(1.0) and value(1.0) == pytest.approx(1.0)
    assert 4.0 > value(0.1) > value(0.4) > 1.0
    assert train.exponential(4.0, 1.0)(0.5) == pytest.approx(2.0)


def test_the_temperature_reaches_every_rule():
    model = nn.Sequential(toy(), toy())
    train.anneal_temperature(model, train.linear(5.0, 1.0))(0.5)
    assert [stage.stages[1].gate.rule.temperature for stage in model] == [3.0, 3.0]
    with pytest.raises(ConfigError, match="no rule"):
        train.anneal_temperature(nn.Linear(1, 1), train.linear(5.0, 1.0))


def test_the_budget_tightens_from_full_to_what_is_asked():
    cost = CostModel(toy(), torch.zeros(1, 8))
    within = train.BudgetPenalty(Budget(macs=0.6 * cost.full), cost)
    told, tighten = repr(within), train.tighten_budget(within, share=0.5)
    for progress, share in ((0.0, 1.0), (0.25, 0.8), (0.5, 0.6), (1.0, 0.6)):
        tighten(progress)
        assert within.macs == pytest.approx(share * cost.full)
    assert repr(within) == told  # the run is the same at any moment of it


@pytest.mark.parametrize("make", [lambda: train.linear(1, 0, share=0), lambda: train.exponential(1, 0)])
def test_schedules_that_mean_nothing(make):
    with pytest.raises(ConfigError):
        make()
