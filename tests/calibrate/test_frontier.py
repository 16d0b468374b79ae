import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from dynanet.calibrate.frontier import Frontier, apply, calibrate
from dynanet.calibrate.risk import UncertifiedWarning
from dynanet.calibrate.table import halt_of
from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import BudgetError, DataError, StructureError
from dynanet.mechanisms.early_exit import EarlyExit

EXAMPLE = torch.zeros(1, 6)


def spent(model, x, cost, *, sparse):
    with torch.no_grad(), record(execute(model, sparse=sparse)) as trace:
        logits = model(x)
    return cost.spent(trace), logits.argmax(-1)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["plain", "nested"])
@pytest.mark.parametrize("part", [0.0, 0.35, 0.7, 1.0])
def test_the_model_does_what_the_choice_said(name, part, sparse, request, held_out):
    model = request.getfixturevalue(name)
    cost = CostModel(model, EXAMPLE)
    frontier = calibrate(model, held_out, cost)
    low, high = frontier.table.mean_macs[[0, -1]]
    budget = Budget(macs=low + part * (high - low))
    choice = frontier.choose(budget)
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    macs, answers = spent(frontier.at(budget), x, cost, sparse=sparse)
    assert macs.mean().item() == pytest.approx(choice.macs, rel=1e-6)
    assert macs.mean().item() <= budget.macs * (1 + 1e-6)
    assert (answers == y).double().mean().item() == choice.accuracy


def test_the_asked_model_is_a_copy_in_eval_mode(plain, held_out):
    frontier = calibrate(plain.train(), held_out, CostModel(plain, EXAMPLE))
    copied = frontier.at(Budget(macs=frontier.table.macs[1], cap_macs=frontier.table.macs[2]))
    assert not copied.training and halt_of(copied)[1].limit == 3
    assert plain.training and plain.limit is None and (plain.thresholds == torch.inf).all()
    with torch.no_grad():
        copied.exits[0].weight.zero_()
    assert plain.exits[0].weight.abs().sum() > 0


@pytest.mark.parametrize("sparse", [False, True])
def test_no_scores_whatever_exceed_a_cap(nested, held_out, sparse):
    cost = CostModel(nested, EXAMPLE)
    frontier = calibrate(nested, held_out, cost)
    cap = frontier.table.worst[1]
    capped = frontier.at(Budget(cap_macs=cap))
    hostile = 100 * torch.randn(64, 6)
    with forced(capped, lambda decision: torch.ones_like(decision.keep)):  # every gate and every exit says: go on
        macs, _ = spent(capped, hostile, cost, sparse=sparse)
    assert macs.max().item() <= cap * (1 + 1e-9)


def test_a_risk_that_cannot_be_promised_warns_and_never_exits_early(plain, held_out):
    frontier = calibrate(plain, held_out, CostModel(plain, EXAMPLE))
    with pytest.warns(UncertifiedWarning, match="too few"):
        careful = frontier.at(Budget(risk=0.001))
    assert (careful.thresholds == torch.inf).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager = frontier.at(Budget(risk=0.9))
    assert (eager.thresholds == -torch.inf).all()


def test_losses_of_ones_own_steer_the_risk(plain, held_out):
    frontier = calibrate(plain, held_out, CostModel(plain, EXAMPLE))
    harmless = np.zeros((150, 4))
    choice = frontier.choose(Budget(risk=0.05), losses=harmless)
    assert choice.promised and choice.share[0] == 1


def test_milliseconds_are_given_when_measured(plain, held_out):
    cost = CostModel(plain, EXAMPLE)
    frontier = calibrate(plain, held_out, cost)
    with pytest.raises(BudgetError, match="timed"):
        frontier.at(Budget(ms=2.0))
    choice = frontier.timed([1, 2, 3, 4]).choose(Budget(ms=2.0))
    assert choice.ms <= 2.0
    again = calibrate(plain, held_out, cost, ms=[1, 2, 3, 4]).choose(Budget(ms=2.0))
    np.testing.assert_array_equal(choice.thresholds, again.thresholds)
    with pytest.raises(DataError):
        frontier.timed([1, 2])


def test_a_frontier_comes_back_from_its_folder(tmp_path, plain, held_out):
    frontier = calibrate(plain, held_out, CostModel(plain, EXAMPLE))
    frontier.save(tmp_path / "frontier")
    frontier.save(tmp_path / "frontier")  # over an old one
    back, budget = Frontier.load(tmp_path / "frontier", plain), Budget(macs=frontier.table.macs[1])
    np.testing.assert_array_equal(back.choose(budget).thresholds, frontier.choose(budget).thresholds)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    written = json.loads((tmp_path / "frontier" / "frontier.json").read_text(), parse_constant=refuse)
    for point, choice in zip(written["curve"], frontier.curve(), strict=True):
        assert [float(t) for t in point["thresholds"]] == choice.thresholds.tolist()
        assert point["macs"] == choice.macs and point["budget"]["macs"] == choice.budget.macs


def test_a_frontier_of_another_model_is_refused(tmp_path, plain, nested, held_out):
    frontier = calibrate(plain, held_out, CostModel(plain, EXAMPLE))
    frontier.save(tmp_path / "frontier")
    with pytest.raises(DataError, match="4 exits"):
        Frontier.load(tmp_path / "frontier", nested)
    with pytest.raises(DataError):
        Frontier.load(tmp_path / "nowhere", plain)
    with pytest.raises(StructureError, match="3 thresholds"):
        apply(nested, frontier.choose(Budget(macs=frontier.table.macs[1])))


def test_a_halt_without_thresholds_is_refused_before_the_pass(held_out):
    class Guess(EarlyExit):
        def __init__(self) -> None:
            super().__init__([nn.Linear(6, 6)] * 2, [nn.Linear(6, 3)] * 2)
            del self.thresholds

    with pytest.raises(StructureError, match="no buffer `thresholds`"):
        calibrate(Guess(), None, None)
