import numpy as np
import pytest

from dynanet.calibrate.risk import (
    betting_passes,
    binomial_cdf,
    binomial_passes,
    certified,
    common_levels,
    least_samples,
    lost_answers,
)
from dynanet.core.errors import BudgetError, DataError

RISK, DELTA = 0.05, 0.1


def draws(times, n, grid, real=False):
    """Losses (n, grid) of fresh samples, and their true means: coupled over the grid as those of one sample are."""
    rng = np.random.default_rng(n + grid)
    true = np.linspace(0, 0.2, grid)
    bad = np.flatnonzero(true > RISK)[0]
    true[bad] = RISK * 1.001  # the hardest case: the first that must not be promised is as good as harmless
    for _ in range(times):
        losses = (rng.random((n, 1)) < true).astype(np.float64)
        if real:  # a real-valued loss of the same mean, negative for some: early may be better than late
            losses = losses + 0.2 * (rng.random((n, 1)) - 0.5) * (losses < 1)
        yield losses, true


def violations(times, n, grid, passes, *, off_by=0, real=False):
    """How often the last of the promised ones (or, off by one, the first that failed) exceeds the risk."""
    exceeded = 0
    for losses, true in draws(times, n, grid, real):
        last = int(np.logical_and.accumulate(passes(losses, RISK, DELTA)).sum()) - 1 + off_by
        exceeded += last >= 0 and true[min(last, grid - 1)] > RISK
    return exceeded / times


def allowed(times):
    return DELTA + 3 * np.sqrt(DELTA * (1 - DELTA) / times)


@pytest.mark.parametrize(("n", "grid"), [(100, 101), (500, 11), (1000, 11), (500, 101)])
def test_the_binomial_promise_is_kept(n, grid):
    assert violations(600, n, grid, binomial_passes) <= allowed(600)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize(("n", "grid"), [(100, 101), (300, 101), (500, 11)])
def test_the_betting_promise_is_kept(n, grid, real):
    assert violations(300, n, grid, betting_passes, real=real) <= allowed(300)


@pytest.mark.parametrize("passes", [binomial_passes, betting_passes])
def test_promising_the_first_that_failed_breaks_the_promise(passes):
    """So the tests above can fail: this is the index of the published code."""
    assert violations(300, 500, 11, passes, off_by=1) > allowed(300)


def test_most_of_the_risk_is_used_with_a_thousand_samples():
    used = [true[certified(losses, RISK, DELTA) - 1] for losses, true in draws(200, 1000, 101)]
    assert np.mean(used) >= 0.75 * RISK


def test_the_binomial_tail_is_exact():
    stats = pytest.importorskip("scipy.stats")
    for n in (1, 2, 5, 37, 1000, 5000):
        for p in (1e-4, 0.01, 0.05, 0.5, 0.77, 0.999):
            expected = stats.binom.cdf(np.arange(n + 1), n, p)
            np.testing.assert_allclose(binomial_cdf(n, p), expected, rtol=1e-9, atol=1e-12)


def test_the_binomial_tail_by_hand():
    np.testing.assert_allclose(binomial_cdf(3, 0.25), np.cumsum([27, 27, 9, 1]) / 64, rtol=1e-14)


def test_the_sequence_stops_at_its_first_failure():
    good, bad = np.zeros(1000), np.ones(1000)
    assert certified(np.stack([good, good, bad, good], 1), RISK, DELTA) == 2
    assert certified(np.stack([bad, good], 1), RISK, DELTA) == 0
    assert certified(np.zeros((0, 5)), RISK, DELTA) == 0


@pytest.mark.parametrize("risk", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("delta", [0.01, 0.1])
def test_least_samples_is_where_perfection_becomes_proof(risk, delta):
    for binary, passes in ((True, binomial_passes), (False, betting_passes)):
        n = least_samples(risk, delta, binary=binary)
        assert passes(np.zeros((n, 1)), risk, delta)[0]
        assert not passes(np.zeros((n - 1, 1)), risk, delta)[0]


def test_losses_that_are_lower_by_early_answers_better_than_late_ones_are_promised_sooner():
    rng = np.random.default_rng(0)
    gap = rng.choice([-1.0, 0.0, 1.0], p=[0.04, 0.90, 0.06], size=(2000, 1))  # 2 % worse in the mean
    assert certified(gap, 0.04, DELTA) == 1
    assert certified(gap.clip(0), 0.04, DELTA) == 0  # 6 % lost, if what is won does not count


def test_lost_answers_are_those_that_only_the_last_exit_has_right(draw):
    table = draw(0, 500)
    gap = table.correct[:, -1:].astype(float) - table.correct
    assert (lost_answers(table)[:, -1] == 0).all()
    np.testing.assert_array_equal(lost_answers(table), gap.clip(0))


def test_the_family_runs_from_never_to_always(draw):
    table = draw(0, 400)
    family = common_levels(table.scores)
    assert 100 <= len(family) <= 101
    assert (family[0] == np.inf).all() and (family[-1] == -np.inf).all()
    assert (np.diff(family[1:-1], axis=0) < 0).all()


def test_senseless_questions_are_refused():
    with pytest.raises(BudgetError):
        certified(np.zeros((10, 2)), 0.0, 0.1)
    with pytest.raises(BudgetError):
        certified(np.zeros((10, 2)), 0.1, 1.0)
    with pytest.raises(DataError):
        certified(np.full((10, 2), 1.5), 0.1, 0.1)
    with pytest.raises(DataError):
        certified(np.full((10, 2), np.nan), 0.1, 0.1)
