from dataclasses import replace

import numpy as np
import pytest

from dynanet.calibrate.budgeted import leaving, outcome
from dynanet.calibrate.operating_point import choose, curve
from dynanet.calibrate.risk import lost_answers
from dynanet.calibrate.table import ExitTable
from dynanet.core.budget import Budget
from dynanet.core.errors import BudgetError, DataError


def accuracy_gap(table: ExitTable) -> np.ndarray:
    """(N, K) losses in {-1, 0, 1}: in the mean, the accuracy lost against the last exit."""
    return table.correct[:, -1:].astype(np.float64) - table.correct


def test_a_budget_in_macs_is_used_up_and_kept(draw):
    table = draw(0, 1000)
    choice = choose(table, Budget(macs=3e6))
    assert 0.99 * 3e6 < choice.macs <= 3e6
    done = outcome(table, choice.thresholds)
    assert (choice.macs, choice.accuracy) == (done.macs, done.accuracy)
    np.testing.assert_array_equal(choice.share, done.share)
    assert choice.promised is None and choice.limit is None and choice.note == ""


@pytest.mark.parametrize("end", [0, -1])
def test_the_ends_of_the_range_are_allowed_and_beyond_them_nothing(draw, end):
    table = draw(0, 333)
    table = replace(table, ms=0.1 * np.arange(1, 6), macs=table.macs * 1.1)  # no round numbers
    assert choose(table, Budget(macs=table.macs[end])).share[end] == 1
    assert choose(table, Budget(ms=table.ms[end])).share[end] == 1
    beyond = 0.999 if end == 0 else 1.001
    for budget in (Budget(macs=table.macs[end] * beyond), Budget(ms=table.ms[end] * beyond)):
        with pytest.raises(BudgetError, match="cheapest" if end == 0 else "most expensive") as said:
            choose(table, budget)
        assert f"{table.macs[0]:.6g} to {table.macs[-1]:.6g}" in str(said.value) or budget.macs is None
        assert "\n" not in str(said.value)


def test_milliseconds_must_be_measured_first(draw):
    table = draw(0, 500)
    with pytest.raises(BudgetError, match="measured"):
        choose(table, Budget(ms=1.0))
    choice = choose(replace(table, ms=np.array([1.0, 1.5, 4.0, 5.0, 6.0])), Budget(ms=2.0))
    assert 1.98 < choice.ms <= 2.0


@pytest.mark.parametrize("ms", [1.5, 2.5, 4.0])
def test_macs_and_milliseconds_hold_together(draw, ms):
    table = replace(draw(1, 1000), ms=np.array([1.0, 1.2, 3.9, 4.5, 6.0]))
    choice = choose(table, Budget(macs=3e6, ms=ms))
    assert choice.macs <= 3e6 * (1 + 1e-9) and choice.ms <= ms * (1 + 1e-9)
    assert max(choice.macs / 3e6, choice.ms / ms) > 0.9  # and one of them is used up, nearly


def test_saturated_scores_never_exceed_a_budget(draw):
    table = draw(2, 4000)
    scores = table.scores.copy()
    scores[:3000] = 40.0  # as float32 does to the softmax
    tied = replace(table, scores=scores)
    for part in (0.3, 0.5, 0.8):
        choice = choose(tied, Budget(macs=part * table.macs[-1]))
        assert choice.macs <= part * table.macs[-1]
        assert choice.share.sum() == pytest.approx(1)
        exits = leaving(scores, choice.thresholds)
        assert len(np.unique(exits[:3000])) == 1  # together


@pytest.mark.parametrize("cap", [1, 3, 5])
def test_a_cap_cuts_the_model_off(draw, cap):
    table = draw(3, 800)
    choice = choose(table, Budget(cap_macs=table.macs[cap - 1] * 1.0001))
    assert choice.limit == cap
    assert choice.share[cap - 1] == 1
    hostile = np.full_like(table.scores, -1e9)
    assert leaving(hostile, choice.thresholds).max() <= cap - 1


def test_a_cap_and_a_mean_hold_together(draw):
    table = draw(3, 800)
    choice = choose(table, Budget(macs=2.5e6, cap_macs=table.macs[2]))
    assert choice.limit == 3 and choice.share[3:].sum() == 0 and 0.98 * 2.5e6 < choice.macs <= 2.5e6
    with pytest.raises(BudgetError, match="at least .*, the first exit; got"):
        choose(table, Budget(cap_macs=table.macs[0] * 0.99))
    with pytest.raises(BudgetError, match="above the most expensive"):
        choose(table, Budget(macs=table.macs[3], cap_macs=table.macs[2]))


@pytest.mark.parametrize("asked", [{"macs": 1e6}, {"risk": 0.9}, {"risk": 0.9, "macs": 1e6}])
def test_a_cap_that_leaves_one_exit_leaves_no_choice(draw, asked):
    table = draw(3, 800)
    choice = choose(table, Budget(cap_macs=table.macs[0], **asked))
    assert choice.limit == 1 and choice.share[0] == 1


def test_a_cap_is_held_against_the_most_expensive_path_not_against_those_seen(draw):
    table = draw(3, 800)
    dearer = replace(table, worst=table.macs * 1.5)
    assert choose(table, Budget(cap_macs=table.macs[2])).limit == 3
    assert choose(dearer, Budget(cap_macs=table.macs[2])).limit == 2


@pytest.mark.parametrize("loss", [lost_answers, accuracy_gap])
def test_the_promised_risk_is_kept_by_fresh_held_out_sets(draw, loss):
    population = draw(5, 40_000)
    losses, rng, times, exceeded, saved = loss(population), np.random.default_rng(0), 100, 0, []
    for _ in range(times):
        rows = rng.choice(40_000, 500, replace=False)
        choice = choose(population.take(rows), Budget(risk=0.04, confidence=0.8), losses=losses[rows])
        exits = leaving(population.scores, choice.thresholds)
        exceeded += losses[np.arange(40_000), exits].mean() > 0.04
        saved.append(1 - choice.macs / population.macs[-1])
    assert exceeded / times <= 0.2 + 3 * np.sqrt(0.2 * 0.8 / times)
    assert np.mean(saved) > 0.1  # and not by never leaving early


def test_too_few_held_out_samples_never_exit_early_and_say_how_many_are_needed(draw):
    few = choose(draw(6, 40), Budget(risk=0.05))
    assert few.promised is False and few.share[-1] == 1 and "too few" in few.note
    needed = int(few.note.rsplit(" ", 1)[1])
    sure = draw(6, needed)
    sure = replace(sure, correct=np.ones_like(sure.correct))  # nothing is ever lost: as many as said suffice
    assert choose(sure, Budget(risk=0.05)).promised is True


def test_a_whole_model_that_errs_too_much_cannot_promise_fewer_errors(draw):
    table = draw(7, 3000)
    choice = choose(table, Budget(risk=0.5 * (1 - table.accuracy[-1])), losses=(~table.correct).astype(float))
    assert choice.promised is False and choice.share[-1] == 1 and "without any early exit" in choice.note


def test_the_order_of_the_file_does_not_matter(draw):
    table = draw(8, 3000)
    by_loss = table.take(np.argsort(accuracy_gap(table)[:, 1], kind="stable"))  # sorted as a folder of classes is
    budget = Budget(risk=0.05)
    there, here = choose(table, budget, accuracy_gap(table)), choose(by_loss, budget, accuracy_gap(by_loss))
    assert here.macs == pytest.approx(there.macs, rel=0.05)


def test_risk_and_cost_are_promised_together_or_refused(draw):
    table, fresh = draw(9, 5000), draw(10, 50_000)
    alone = choose(table, Budget(risk=0.05))
    both = choose(table, Budget(risk=0.05, macs=1.15 * alone.macs))
    assert both.promised and both.macs <= 1.15 * alone.macs
    done = outcome(fresh, both.thresholds)
    assert done.macs <= 1.15 * alone.macs
    assert lost_answers(fresh)[np.arange(50_000), leaving(fresh.scores, both.thresholds)].mean() <= 0.05
    with pytest.raises(BudgetError, match="cannot be promised together"):
        choose(table, Budget(risk=0.05, macs=0.8 * alone.macs))
    with pytest.raises(BudgetError, match="too few"):
        choose(draw(9, 30), Budget(risk=0.05, macs=3e6))


def test_losses_must_belong_to_the_table_and_to_a_risk(draw):
    table = draw(0, 100)
    with pytest.raises(DataError, match="losses must have shape"):
        choose(table, Budget(risk=0.1), losses=np.zeros((99, 5)))
    with pytest.raises(DataError, match="at most 1"):
        choose(table, Budget(risk=0.1), losses=np.full((100, 5), 3.0))
    with pytest.raises(BudgetError, match="without a risk"):
        choose(table, Budget(macs=3e6), losses=np.zeros((100, 5)))


def test_the_curve_rises_from_the_cheapest_to_the_most_expensive(draw):
    table = draw(11, 1000)
    points = curve(table, 12)
    macs, accuracy = np.array([(p.macs, p.accuracy) for p in points]).T
    assert points[0].share[0] == 1 and points[-1].share[-1] == 1
    assert (np.diff(macs) > 0).all()
    assert (np.diff(accuracy) > -0.01).all()
    assert all(p.macs <= p.budget.macs * (1 + 1e-9) for p in points)


def test_a_choice_prints_what_was_asked_and_what_was_reached(draw):
    text = str(choose(draw(0, 40), Budget(risk=0.05)))
    assert "Budget(risk=0.05" in text and "MACs" in text and "NOT promised" in text and "too few" in text
