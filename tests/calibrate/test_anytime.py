import numpy as np
import pytest

from dynanet.calibrate.anytime import anytime_curve, random_exits
from dynanet.calibrate.budgeted import outcome


def test_the_anytime_curve_is_what_thresholds_for_one_exit_give(draw):
    table = draw(0, 300)
    for k, point in enumerate(anytime_curve(table)):
        one = np.full(5, np.inf)
        one[k] = -np.inf
        alone = outcome(table, one[:-1])
        assert (point.macs, point.accuracy) == pytest.approx((alone.macs, alone.accuracy), rel=1e-12)
        np.testing.assert_array_equal(point.share, alone.share)


def test_random_exits_agree_with_drawn_ones(draw):
    table, share = draw(1, 4000), np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    exits = np.random.default_rng(0).choice(5, size=(200, 4000), p=share)
    drawn = table.correct[np.arange(4000), exits].mean()
    expected = random_exits(table, share)
    assert expected.accuracy == pytest.approx(drawn, abs=0.003)
    assert expected.macs == pytest.approx(table.macs[exits].mean(), rel=0.003)
