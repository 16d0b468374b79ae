import numpy as np
import pytest
import torch
from torch import nn

from dynanet.calibrate import outcome
from dynanet.calibrate.frontier import Frontier
from dynanet.calibrate.learned_exits import (
    cost_weight,
    fit_gates,
    fit_scores,
    rescore,
    schedule,
    with_learned_confidence,
)
from dynanet.calibrate.table import ExitTable, tabulate
from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, record
from dynanet.core.errors import BudgetError, ConfigError, DataError, StructureError
from dynanet.gates.confidence import LearnedGate, LearnedScore, MaxProbability, PerExit
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.session import Session

CLASSES = 4


def population(seed, n=1500):
    """A table whose exits are surest where they are wrong: they know class 0 alone, and only the last exit the rest."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=n)
    logits = rng.normal(size=(n, 3, CLASSES)) * 0.3
    for k in range(2):
        easy = labels == 0
        guess = np.where(easy, 0, 1 + labels % (CLASSES - 1))
        logits[np.arange(n), k, guess] += np.where(easy, 2.0, 3.0)
    logits[np.arange(n), 2, labels] += 5.0
    answers = logits.argmax(-1)
    table = ExitTable(
        np.zeros((n, 2)), answers, answers == labels[:, None], np.array([1e6, 2e6, 4e6]), labels=labels, logits=logits
    )
    return rescore(table, MaxProbability())


@pytest.mark.parametrize("fit", [fit_scores, lambda table, budget: fit_gates(table, cost_weight(table, budget))])
def test_what_is_learned_beats_max_probability_where_that_misleads(fit):
    held_out, test, budget = population(0), population(1), Budget(macs=3.4e6)
    plain = Frontier(nn.Identity(), held_out).choose(budget)
    confidence = fit(held_out, budget)
    chosen = Frontier(nn.Identity(), rescore(held_out, confidence)).choose(budget)
    gained = outcome(rescore(test, confidence), chosen.thresholds).accuracy - outcome(test, plain.thresholds).accuracy
    assert chosen.macs <= budget.macs
    assert gained > 0.05


def test_scores_are_the_odds_of_being_right():
    confidence, test = fit_scores(population(0), Budget(macs=3e6)), population(1)
    chance = 1 / (1 + np.exp(-rescore(test, confidence).scores))
    for k in range(2):
        sure = chance[:, k] > 0.8
        assert sure.any() and abs(chance[sure, k].mean() - test.correct[sure, k].mean()) < 0.1


def test_the_schedule_spends_the_budget(deep):
    model, held_out, cost, x = deep
    table = tabulate(model, held_out, cost, keep_logits=True)
    for part in (0.3, 0.6):
        budget = Budget(macs=table.macs[0] + part * (table.macs[-1] - table.macs[0]))
        done = schedule(Frontier(model, table), budget)
        with torch.no_grad(), record(done) as trace:
            done(x)
        price = CostModel(done, x[:1])
        assert price.spent(trace).mean().item() == pytest.approx(budget.macs, rel=0.01)
        assert price.full > cost.full, "scores cost something, and it is counted"


@pytest.mark.parametrize("fit", [fit_scores, lambda table, budget: fit_gates(table, 0.3)])
def test_exits_that_are_off_learn_nothing_and_the_others_know_their_place(deep, fit):
    model, held_out, cost, x = deep
    model.active = (0, 2, 3)
    table = tabulate(model, held_out, CostModel(model, x[:1]), keep_logits=True)
    budget = Budget(macs=0.6 * table.macs[-1])
    frontier = with_learned_confidence(Frontier(model, table), fit(table, budget))
    again = tabulate(frontier.model, held_out, CostModel(frontier.model, x[:1]))
    np.testing.assert_allclose(again.scores, frontier.table.scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again.macs, frontier.table.macs)
    small, choice = frontier.at(budget), frontier.choose(budget)
    with torch.no_grad(), record(execute(small, sparse=True)) as trace:
        small(x)
    assert CostModel(small, x[:1]).spent(trace).mean().item() == pytest.approx(choice.macs, rel=1e-3)
    assert small.active == (0, 2, 3) and small.thresholds[1] == torch.inf


@pytest.fixture
def deep():
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 8), nn.Tanh()) for _ in range(4)]
    model = EarlyExit(stages, [nn.Linear(8, CLASSES) for _ in range(4)]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
        x = torch.randn(300, 8)
        y = model.answers(x)[-1].argmax(1)
    return model, [(x[:200], y[:200]), (x[200:], y[200:])], CostModel(model, x[:1]), x


@pytest.mark.parametrize("fit", [fit_scores, lambda table, budget: fit_gates(table, 0.3)])
def test_a_learned_model_scores_as_its_table_and_runs_everywhere(deep, fit):
    model, held_out, cost, x = deep
    table = tabulate(model, held_out, cost, keep_logits=True)
    budget = Budget(macs=0.6 * table.macs[-1])
    frontier = with_learned_confidence(Frontier(model, table), fit(table, budget))
    again = tabulate(frontier.model, held_out, CostModel(frontier.model, x[:1]))
    np.testing.assert_allclose(again.scores, frontier.table.scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(again.macs, frontier.table.macs)
    np.testing.assert_allclose(again.worst, frontier.table.worst)
    assert isinstance(model.confidence, MaxProbability), "the model that was given stays as it is"
    choice, small = frontier.choose(budget), frontier.at(budget)
    session = Session(small, x, engines="eager")
    for run in (execute(small, sparse=False), execute(small, sparse=True), session):
        with torch.no_grad(), record(run) as trace:
            answers = run(x)
        shares = torch.cat(trace[""], 1).sum(1).long().bincount(minlength=4) / len(x)
        np.testing.assert_allclose(shares, choice.share, atol=0.01)
        torch.testing.assert_close(answers, small(x), rtol=1e-4, atol=1e-5)


def test_only_the_rows_given_are_read(deep):
    model, held_out, cost, _ = deep
    table = tabulate(model, held_out, cost, keep_logits=True)
    half = fit_gates(table.take(np.arange(150)), 0.3)
    other = table.logits.copy()
    other[150:] = 0
    altered = ExitTable(table.scores, table.answers, table.correct, table.macs, labels=table.labels, logits=other)
    for a, b in zip(half.parameters(), fit_gates(altered.take(np.arange(150)), 0.3).parameters(), strict=True):
        assert torch.equal(a, b)


def test_where_leaving_is_never_or_always_best_gates_say_so_in_the_order_of_max_probability():
    table = population(0)
    logits = table.logits.copy()
    logits[:, 2] = 20 * np.eye(CLASSES)[table.labels]  # the last exit's loss is the least, for everybody
    table = ExitTable(table.scores, table.answers, table.correct, table.macs, labels=table.labels, logits=logits)
    never, always = (rescore(table, fit_gates(table, weight)).scores for weight in (0.0, 1e6))
    assert (never < 0).all() and (always > 0).all()
    np.testing.assert_array_equal(never.argsort(0, kind="stable")[-5:], table.scores.argsort(0, kind="stable")[-5:])


def test_a_weight_for_a_budget_makes_the_best_exits_cost_it():
    table = population(0)
    weights = [cost_weight(table, Budget(macs=macs)) for macs in (1.5e6, 2.5e6, 3.5e6)]
    assert weights == sorted(weights, reverse=True)


def test_what_cannot_be_learned_from_is_refused(deep):
    model, held_out, cost, _ = deep
    bare, table = tabulate(model, held_out, cost), population(0)
    for fit in (lambda t: fit_gates(t, 0.1), lambda t: fit_scores(t, Budget(macs=cost.full))):
        with pytest.raises(DataError, match="keep_logits=True"):
            fit(bare)
    with pytest.raises(DataError, match="two exits, got one"):
        rescore(table.first(1), MaxProbability())
    unlabelled = ExitTable(table.scores, table.answers, table.correct, table.macs, logits=table.logits)
    with pytest.raises(DataError, match="fitted to labels"):
        fit_gates(unlabelled, 0.1)
    with pytest.raises(BudgetError, match="the cheapest exit; got"):
        fit_scores(table, Budget(macs=10))
    with pytest.raises(BudgetError, match="Budget\\(macs=...\\)"):
        cost_weight(table, Budget(risk=0.1))
    for wrong in ({"weight": -1.0}, {"weight": 0.1, "decay": float("nan")}):
        with pytest.raises(ConfigError):
            fit_gates(table, **wrong)
    with pytest.raises(StructureError, match="no confidence for exit .*, only 1;"):
        rescore(table, PerExit([LearnedGate()]))

    class Mute(EarlyExit):
        def __init__(self) -> None:
            super().__init__([nn.Linear(8, 8)] * 3, [nn.Linear(8, CLASSES)] * 3)
            del self.confidence

    with pytest.raises(StructureError, match="no `confidence`"):
        with_learned_confidence(Frontier(Mute(), table), PerExit([LearnedScore(CLASSES)] * 2))
