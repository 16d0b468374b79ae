import math

import numpy as np
import pytest

from dynanet.report.statistics import NORMAL_95, class_mean, kappa, mean_margin, wilson


def test_statistics_agree_with_sums_by_hand():
    truth, said = np.array([0] * 50 + [1] * 50), np.array([0] * 40 + [1] * 10 + [1] * 30 + [0] * 20)
    assert kappa(truth, said) == pytest.approx((0.7 - 0.5) / 0.5)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # 3.8415 / 13.8415
    low, high = wilson(0.7, 100)
    assert (low, high) == pytest.approx((0.6042, 0.7811), abs=1e-4)


def test_an_interval_holds_its_share_and_narrows_with_more_samples():
    for share in (0.0, 0.01, 0.5, 1.0):
        low, high = wilson(share, 50)
        assert 0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1
        assert wilson(1 - share, 50) == pytest.approx((1 - high, 1 - low))
        narrow = wilson(share, 5000)
        assert narrow[1] - narrow[0] < high - low


def test_the_margin_of_a_mean_covers_it_in_95_of_100_draws():
    values = np.random.default_rng(0).normal(size=(2000, 100))
    covered = [abs(row.mean()) <= mean_margin(row) for row in values]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)
    assert mean_margin(np.full(9, 0.3)) == pytest.approx(0)
    assert mean_margin(np.array([0.0, 1.0])) == pytest.approx(NORMAL_95 * 0.5 / math.sqrt(2))


def test_every_class_that_occurs_counts_once():
    truth = np.array([0] * 98 + [2] * 2)
    assert class_mean(truth, np.zeros(100, int)) == 0.5
    assert class_mean(truth, truth) == 1


def test_agreement_by_chance_is_none_and_of_a_single_class_unknown():
    truth = np.array([0, 0, 1, 1])
    assert kappa(truth, truth) == 1 and kappa(truth, np.array([0, 1, 0, 1])) == 0
    assert kappa(truth, 1 - truth) == -1
    assert math.isnan(kappa(np.zeros(3, int), np.zeros(3, int)))
