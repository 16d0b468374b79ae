"""Shares of the full model's MACs as budgets, and budgets as words."""

from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from dynanet.calibrate.frontier import Frontier
from dynanet.calibrate.table import ExitTable
from dynanet.core.budget import Budget
from dynanet.core.errors import BudgetError, ConfigError
from dynanet.experiment import RequestedBudgets
from dynanet.experiment.budgets import budget_of, cheapest_share, described, full_macs, in_words, operating_points


@pytest.fixture
def frontier():
    """Of three exits, the first of which takes 0.3 of the full MACs; surer where it is right."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    correct = rng.random((300, 3)) < [0.6, 0.8, 0.9]
    scores = correct[:, :-1] + 0.3 * rng.normal(size=(300, 2))
    answers = np.where(correct, labels[:, None], (labels[:, None] + 1) % 4)
    return Frontier(nn.Identity(), ExitTable(scores, answers, correct, np.array([300.0, 600.0, 1000.0]), labels=labels))


def test_budgets_in_words():
    assert in_words(Budget(macs=500.0), 1000.0) == "50 % of the MACs"
    assert in_words(Budget(macs=125.0), 1000.0) == "12.5 % of the MACs"
    assert in_words(Budget(risk=0.05, confidence=0.9), 1000.0) == "risk 5 %, confidence 90 %"


def test_every_share_of_a_path_is_a_budget_and_no_other_is(frontier):
    assert (full_macs(frontier), cheapest_share(frontier)) == (1000, pytest.approx(0.3))
    for share in (0.3, 0.5, 1.0):
        assert budget_of(frontier, share) == Budget(macs=1000 * share)
    with pytest.raises(BudgetError, match="0.29 is below the cheapest path: this model can spend 0.300 to 1.000"):
        budget_of(frontier, 0.29)
    with pytest.raises(BudgetError, match="share of 1.1 is above the most expensive path"):
        budget_of(frontier, 1.1)


def test_points_keep_to_the_shares_in_their_order_and_the_risk_is_last(frontier):
    points = operating_points(frontier, RequestedBudgets(shares=(0.4, 0.9), risk=0.2, confidence=0.8))
    assert [each.budget for each in points] == [
        Budget(macs=400.0),
        Budget(macs=900.0),
        Budget(risk=0.2, confidence=0.8),
    ]
    assert points[0].macs <= 400 * (1 + 1e-9) and points[1].macs <= 900 * (1 + 1e-9)
    usual = operating_points(frontier, RequestedBudgets())
    assert [each.budget.macs for each in usual] == [750, 500, None], "a quarter is below the first exit"


def test_positions_of_an_image_promise_no_risk(frontier):
    grouped = replace(frontier, table=replace(frontier.table, groups=np.arange(300) // 10))
    assert [each.budget.risk for each in operating_points(grouped, RequestedBudgets(shares=(0.5,)))] == [None]


@pytest.mark.parametrize("wrong", [{"shares": ("half",)}, {"shares": (True,)}, {"risk": "low"}, {"confidence": None}])
def test_budgets_are_numbers(wrong):
    with pytest.raises(ConfigError, match="expected a number"):
        RequestedBudgets(**wrong)


def test_an_operating_point_is_described_by_its_share(frontier):
    (point,) = operating_points(frontier, RequestedBudgets(shares=(0.5,), risk=None))
    said = described(point, full_macs(frontier))
    assert "50 % of the MACs" in said and str(point.budget) not in said
