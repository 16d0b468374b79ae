import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynanet.calibrate.budgeted import geometric, leaving, outcome, thresholds_for_share
from dynanet.calibrate.thresholds import ThresholdSearch


def problem(table, correct=None):
    correct = table.correct if correct is None else correct
    return ThresholdSearch(table.scores, correct.astype(float), np.broadcast_to(table.macs, correct.shape))


def best_geometric(table, bound):
    """The paper's family, searched finely: the highest cost within the bound."""
    found = [
        outcome(table, thresholds_for_share(table.scores, geometric(table.exits, ratio)))
        for ratio in np.exp(np.linspace(-6, 6, 241))
    ]
    return max((o for o in found if o.macs <= bound), key=lambda o: o.macs)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 60),
    exits=st.integers(2, 5),
    ties=st.sampled_from([None, 1, 2]),
    part=st.floats(0, 1),
    nested=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_budget_is_never_exceeded_on_the_held_out_samples(seed, n, exits, ties, part, nested):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n, exits - 1))
    scores = scores if ties is None else np.round(scores * ties) / ties
    cost = rng.uniform(0.5, 1.5, size=(n, exits) if nested else (1, exits)).cumsum(1) * np.ones((n, 1))
    values = (rng.random((n, exits)) < np.linspace(0.4, 0.9, exits)).astype(float)
    low, high = cost.mean(0)[[0, -1]]
    bound = low + part * (high - low)
    thresholds = ThresholdSearch(scores, values, cost).best_within(bound)
    assert cost[np.arange(n), leaving(scores, thresholds)].mean() <= bound * (1 + 1e-9)


@pytest.mark.parametrize("ties", [None, 4])
@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
def test_at_least_the_papers_accuracy_is_reached(draw, part, ties):
    for seed in range(2):
        table = draw(seed, 1500, ties=ties)
        bound = part * table.macs[-1]
        reached = outcome(table, problem(table).best_within(bound)).accuracy
        assert reached >= best_geometric(table, bound).accuracy - 1 / 1500


@pytest.mark.parametrize("part", [0.4, 0.6, 0.8])
def test_nearly_the_best_of_all_pairs_of_thresholds(draw, part):
    table = draw(3, 500, exits=3)
    bound = part * table.macs[-1]
    levels = [np.r_[-np.inf, np.quantile(table.scores[:, k], np.linspace(0, 1, 50)), np.inf] for k in range(2)]
    tried = (outcome(table, np.array(pair)) for pair in itertools.product(*levels))
    best = max(o.accuracy for o in tried if o.macs <= bound)
    assert outcome(table, problem(table).best_within(bound)).accuracy >= best - 0.012


def test_an_exit_that_is_not_worth_its_place_is_switched_off(draw):
    table = draw(4, 3000)
    scores, correct = table.scores.copy(), table.correct.copy()
    rng = np.random.default_rng(0)
    scores[:, 2], correct[:, 2] = rng.normal(size=3000), rng.random(3000) < 0.1  # knows nothing, and is wrong
    useless = ThresholdSearch(scores, correct.astype(float), np.broadcast_to(table.macs, correct.shape))
    thresholds = [useless.best_within(part * table.macs[-1]) for part in (0.4, 0.5, 0.6, 0.7)]
    assert all((leaving(scores, t) == 2).mean() < 0.02 for t in thresholds)
    assert any(t[2] == np.inf for t in thresholds)


def test_fresh_samples_cost_what_was_asked_and_gain_over_the_paper(draw):
    gains = []
    for seed, part in itertools.product(range(2), (0.3, 0.5, 0.7)):
        held_out, test = draw(seed, 2000), draw(100 + seed, 10_000)
        bound = part * held_out.macs[-1]
        thresholds = problem(held_out).best_within(bound)
        assert outcome(held_out, thresholds).macs >= 0.99 * bound
        assert outcome(test, thresholds).macs == pytest.approx(bound, rel=0.05)
        share = best_geometric(held_out, bound).share
        paper = outcome(test, thresholds_for_share(held_out.scores, share))
        gains.append(outcome(test, thresholds).accuracy - paper.accuracy)
    assert np.mean(gains) > 0


def test_a_budget_that_brings_nothing_is_spent_unless_it_harms(draw):
    table = draw(5, 2000)
    bound = 0.95 * table.macs[-1]
    idle = table.correct.copy()
    idle[:, 3:] = idle[:, 2:3]  # the last exits know no more than the third
    assert outcome(table, problem(table, idle).best_within(bound)).macs >= 0.99 * bound

    harmful = table.correct.copy()
    harmful[:, -1] = False
    assert outcome(table, problem(table, harmful).best_within(bound)).macs < 0.8 * bound


def test_the_same_table_gives_the_same_thresholds_quickly(draw):
    table = draw(6, 5000, exits=10)
    began = time.perf_counter()
    first = problem(table).best_within(0.4 * table.macs[-1])
    assert time.perf_counter() - began < 15  # about 1 s on one core
    np.testing.assert_array_equal(first, problem(table).best_within(0.4 * table.macs[-1]))
