import numpy as np
import pytest

from dynanet.calibrate.budgeted import leaving, outcome
from dynanet.calibrate.operating_point import choose, curve
from dynanet.calibrate.table import ExitTable
from dynanet.core.budget import Budget
from dynanet.core.errors import ConfigError, DataError
from dynanet.report import Origin, Samples, Timing, find
from dynanet.report.evaluation import budget_name

NAMES = ["wheat", "woods", "corn", "oats", "hay"]
ORIGIN = Origin(data="made up", test="test part", held_out="validation part", held_out_samples=400)


def test_operations_are_the_choices_on_the_test_samples(draw, operating_points):
    test = draw(2)
    f = find(test, operating_points, ORIGIN, NAMES)
    for point, evaluation in zip(operating_points, f.evaluations, strict=True):
        done = outcome(test, point.thresholds)
        assert evaluation.outcome.accuracy == done.accuracy and evaluation.outcome.macs == done.macs
        assert evaluation.change == pytest.approx(done.accuracy - test.accuracy[-1])
        assert evaluation.low < done.accuracy < evaluation.high
        assert evaluation.ms == done.ms
    assert f.full.accuracy == test.accuracy[-1] and f.full.macs == 8e6 and f.full_ms == 0.05


def test_the_difference_to_full_is_certain_where_nothing_differs(draw):
    test = draw(2)
    never = choose(draw(1), Budget(cap_macs=8e6))
    (evaluation,) = find(test, [never], ORIGIN, NAMES).evaluations
    assert evaluation.change == 0 and evaluation.change_margin == 0 and evaluation.lost == 0
    assert evaluation.random == pytest.approx(test.accuracy[-1])


def test_shares_of_exits_and_classes_add_up_to_the_whole(draw, operating_points):
    test = draw(2)
    f = find(test, operating_points, ORIGIN, NAMES)
    done = f.evaluation.outcome
    assert sum(each.share for each in f.exits) == pytest.approx(1)
    assert sum(each.share * (each.right or 0) for each in f.exits) == pytest.approx(done.accuracy)
    assert sum(each.share * (each.full or 0) for each in f.exits) == pytest.approx(f.full.accuracy)
    weights = np.array([each.samples for each in f.classes]) / test.samples
    assert weights @ [each.right for each in f.classes] == pytest.approx(done.accuracy)
    assert weights @ [each.spent for each in f.classes] == pytest.approx(done.macs / 8e6)
    assert weights @ np.stack([each.share for each in f.classes]) == pytest.approx(done.share)
    spent = [each.spent for each in f.classes]
    assert spent == sorted(spent, reverse=True)
    assert f.classes[-1].name == "wheat"  # made to be easy


def test_macs_of_every_sample_are_used_where_they_differ(draw, operating_points):
    test = draw(2)
    own = np.random.default_rng(0).uniform(0.5, 1.5, (test.samples, 1)) * test.macs
    table = ExitTable(test.scores, test.answers, test.correct, own, labels=test.labels)
    f = find(table, operating_points, ORIGIN, NAMES)
    exits = leaving(test.scores, operating_points[f.explained].thresholds)
    spent = own[np.arange(test.samples), exits] / own[:, -1].mean()
    for each in f.classes:
        assert each.spent == pytest.approx(spent[test.labels == NAMES.index(each.name)].mean())
    for sample in (*f.easy, *f.hard):
        assert sample.spent == pytest.approx(spent[sample.row])


def test_the_explained_budget_is_a_plain_one_near_half(draw, operating_points):
    f = find(draw(2), operating_points[::-1], ORIGIN, NAMES)
    assert f.evaluation.point.budget == Budget(macs=4e6)
    assert find(draw(2), operating_points, ORIGIN, NAMES, explain=1).evaluation.point is operating_points[1]


def test_a_risk_comes_with_its_certificate(draw, operating_points):
    test = draw(2)
    (promise,) = find(test, operating_points, ORIGIN, NAMES).promises
    assert promise.kept and (promise.risk, promise.confidence) == (0.1, 0.9)
    assert promise.tested == 360  # a tenth of the held-out samples proposed the thresholds
    rows, exits = np.arange(test.samples), promise.evaluation.exits
    lost = (test.correct[:, -1] & ~test.correct[rows, exits]).mean()
    assert promise.evaluation.lost == pytest.approx(lost)
    few = choose(draw(1).take(np.arange(20)), Budget(risk=0.01))
    (refused,) = find(test, [few], Origin(data="d", test="t"), NAMES).promises
    assert not refused.kept and refused.tested is None


def test_lines_are_curves_on_the_test_samples_and_lots_with_the_same_shares(draw, operating_points):
    test = draw(2)
    f = find(test, operating_points, ORIGIN, NAMES, line=curve(draw(1), points=7))
    assert len(f.line) == len(f.random) == 7
    for looked, lot in zip(f.line, f.random, strict=True):
        assert lot.macs == pytest.approx(looked.macs)
        assert lot.accuracy == pytest.approx(looked.share @ test.accuracy)
    assert [each.macs for each in f.alone] == [1e6, 2e6, 4e6]


def test_measured_times_go_before_those_of_the_exits(draw, operating_points):
    f = find(draw(2), operating_points, ORIGIN, NAMES, timing=Timing("batch 8", 0.04, [0.03, None, 0.02]))
    assert f.full_ms == 0.04 and f.evaluations[0].ms == 0.03
    assert f.evaluations[1].ms == f.evaluations[1].outcome.ms
    assert "batch 8" in f.how_timed
    assert find(draw(2, ms=False), operating_points, ORIGIN, NAMES).how_timed == ""


def test_times_of_exits_say_how_they_were_measured(draw, operating_points):
    origin = Origin(data="d", test="t", timed="batch 64, 1 thread")
    assert "(batch 64, 1 thread)" in find(draw(2), operating_points, origin, NAMES).how_timed
    assert "(" not in find(draw(2), operating_points, ORIGIN, NAMES).how_timed
    assert find(draw(2, ms=False), operating_points, origin, NAMES).how_timed == ""


def test_budgets_in_words():
    assert budget_name(Budget(macs=5e5, ms=0.25), 2e6) == "25 % of the MACs, 0.25 ms"
    assert budget_name(Budget(risk=0.05), 2e6) == "risk at most 5 %"
    assert budget_name(Budget(cap_macs=1e6), 2e6) == "no sample above 50 % of the MACs"


def test_what_does_not_fit_is_refused(draw, operating_points):
    test = draw(2)
    with pytest.raises(ConfigError, match="at least one operating point"):
        find(test, [], ORIGIN, NAMES)
    with pytest.raises(ConfigError, match="from 0 to 2, got 3"):
        find(test, operating_points, ORIGIN, NAMES, explain=3)
    with pytest.raises(DataError, match="3 class names for classes from 0 to 4"):
        find(test, operating_points, ORIGIN, NAMES[:3])
    with pytest.raises(DataError, match="one time per operating point .3., or None; got 1"):
        find(test, operating_points, ORIGIN, NAMES, timing=Timing("", 1.0, [1.0]))
    unlabelled = ExitTable(test.scores, test.answers, test.correct, test.macs)
    with pytest.raises(DataError, match="labels of the test samples"):
        find(unlabelled, operating_points, ORIGIN, NAMES)
    with pytest.raises(DataError, match="3 names for 400"):
        find(test, operating_points, ORIGIN, NAMES, shown=Samples(names=["a", "b", "c"]))
    with pytest.raises(DataError, match="float64 of shape"):
        find(test, operating_points, ORIGIN, NAMES, shown=Samples(pictures=np.zeros((400, 4, 4))))
    with pytest.raises(DataError, match="wavelengths of shape None"):
        find(test, operating_points, ORIGIN, NAMES, shown=Samples(spectra=np.zeros((400, 6))))
