import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dynanet.calibrate.budgeted import (
    PAPER_RATIOS,
    budgeted_batch,
    geometric,
    leaving,
    outcome,
    settled,
    thresholds_for_share,
)
from dynanet.core.errors import BudgetError, DataError
from dynanet.gates.confidence import MaxProbability

TIED = st.integers(-3, 3).map(float)
FEW_VALUES = hnp.arrays(np.float64, st.tuples(st.integers(1, 40), st.integers(1, 4)), elements=TIED)


def shares(scores, thresholds):
    return np.bincount(leaving(scores, thresholds), minlength=scores.shape[1] + 1) / len(scores)


def reference_share(confidence, share):
    """The share that leaves at the first exit under the reference's rule: all that reach the n-th confidence."""
    threshold = np.sort(confidence)[::-1][int(np.floor(len(confidence) * share))]
    return (confidence >= threshold).mean()


def test_the_papers_shares():
    np.testing.assert_allclose(geometric(5, 20 / 20), [0.2] * 5)
    np.testing.assert_allclose(geometric(5, 1 / 20), [0.95, 0.0475, 0.0024, 0.0001, 0.0], atol=5e-5)
    assert len(PAPER_RATIOS) == 39 and PAPER_RATIOS[0] == 0.05 and PAPER_RATIOS[-1] == 1.95
    assert np.isfinite(geometric(1000, 1.95)).all()  # the powers themselves overflow


@pytest.fixture(scope="module")
def saturated_logits():
    """4000 samples, five exits; 3000 so sure that their float32 softmax is exactly 1."""
    torch.manual_seed(0)
    logits = torch.randn(4000, 5, 10)
    logits[:3000, :, 0] += 40 + 20 * torch.rand(3000, 1)
    return logits


def test_saturated_softmax_overshoots_and_log_odds_meet_the_share(saturated_logits):
    softmax = saturated_logits.softmax(-1).amax(-1).numpy()
    assert (softmax[:, 0] == 1).sum() == 3000
    assert reference_share(softmax[:, 0], 0.2) == 0.75  # the trap is there

    scores = MaxProbability()(saturated_logits.flatten(0, 1)).reshape(4000, 5)[:, :-1].double().numpy()
    reached = shares(scores, thresholds_for_share(scores, geometric(5, 1.0)))
    np.testing.assert_allclose(reached, 0.2, atol=1 / 4000)


def test_tied_scores_stay_together_rather_than_overshoot(saturated_logits):
    scores = saturated_logits.softmax(-1).amax(-1).double().numpy()[:, :-1]
    reached = shares(scores, thresholds_for_share(scores, geometric(5, 1.0)))
    assert (reached[:-1] <= 0.2).all()
    assert reached[-1] >= 0.75
    everybody_fits = shares(scores, thresholds_for_share(scores, np.array([0.8, 0.05, 0.05, 0.05, 0.05])))
    assert 0.75 <= everybody_fits[0] <= 0.8


@given(FEW_VALUES, st.floats(0.05, 20))
@settings(max_examples=100, deadline=None)
def test_no_exit_gets_more_than_its_share(scores, ratio):
    asked = geometric(scores.shape[1] + 1, ratio)
    reached = shares(scores, thresholds_for_share(scores, asked))
    assert (reached[:-1] <= asked[:-1] + 1e-9).all()


@given(st.integers(0, 10_000), st.integers(1, 200), st.integers(2, 6), st.floats(0.05, 20))
@settings(max_examples=100, deadline=None)
def test_without_ties_every_exit_gets_its_share(seed, n, exits, ratio):
    scores = np.random.default_rng(seed).normal(size=(n, exits - 1))
    asked = geometric(exits, ratio)
    reached = shares(scores, thresholds_for_share(scores, asked))
    assert (np.abs(reached - asked)[:-1] < 1 / n + 1e-9).all()


@given(FEW_VALUES, st.lists(st.sampled_from([-np.inf, -2.0, -0.5, 0.0, 1.0, 2.5, np.inf]), min_size=4, max_size=4))
@settings(max_examples=100, deadline=None)
def test_settled_thresholds_let_the_same_samples_leave(scores, thresholds):
    thresholds = np.array(thresholds[: scores.shape[1]])
    better = settled(scores, thresholds)
    np.testing.assert_array_equal(leaving(scores, better), leaving(scores, thresholds))
    np.testing.assert_array_equal(better, better.astype(np.float32))  # what a model's buffer will hold


def test_settled_thresholds_hold_against_another_engines_rounding():
    scores = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32).astype(np.float64)
    thresholds = thresholds_for_share(scores, geometric(4, 1.0))
    np.testing.assert_array_equal(leaving(scores + 1e-6, thresholds), leaving(scores, thresholds))
    np.testing.assert_array_equal(leaving(scores - 1e-6, thresholds), leaving(scores, thresholds))


def test_neighbouring_floats_are_still_told_apart():
    low = np.float32(1.0)
    scores = np.array([[low], [np.nextafter(low, np.float32(2))]], dtype=np.float64)
    threshold = thresholds_for_share(scores, np.array([0.5, 0.5])).astype(np.float32)
    np.testing.assert_array_equal(leaving(scores, threshold), [1, 0])


def test_an_outcome_is_what_a_loop_over_samples_finds(draw):
    table, thresholds = draw(0, 200), np.array([1.0, np.inf, 0.5, -np.inf])
    exits = [next((k for k in range(4) if table.scores[i, k] >= thresholds[k]), 4) for i in range(200)]
    found = outcome(table, thresholds)
    assert found.accuracy == np.mean([table.correct[i, k] for i, k in enumerate(exits)])
    assert found.macs == pytest.approx(np.mean([table.macs[k] for k in exits]), rel=1e-12)
    np.testing.assert_array_equal(found.share * 200, [exits.count(k) for k in range(5)])


def test_the_papers_curve_spends_more_at_higher_ratios_on_other_data(draw):
    held_out, test = draw(1, 8000), draw(2, 8000)
    curve = budgeted_batch(held_out, test)
    macs = np.array([point.macs for point in curve])
    assert len(curve) == 39 and (np.diff(macs) > 0).all()
    asked = np.array([geometric(5, ratio) @ test.macs for ratio in PAPER_RATIOS])
    np.testing.assert_allclose(macs, asked, rtol=0.05)


def test_senseless_shares_are_refused(draw):
    with pytest.raises(BudgetError):
        geometric(5, 0.0)
    with pytest.raises(BudgetError):
        thresholds_for_share(draw(0, 10).scores, np.array([0.5, 0.5, 0.5, 0.0, 0.0]))
    with pytest.raises(DataError):
        outcome(draw(0, 10), np.zeros(3))
