import numpy as np
import pytest

from dynanet.calibrate.budgeted import leaving
from dynanet.core.errors import DataError
from dynanet.report import Samples, find
from dynanet.report.samples import PER_CLASS, SHOWN, class_spectra, confident_mistakes, easiest, hardest
from tests.report.pages import NAMES, ORIGIN, scene


def test_easy_samples_leave_first_hard_ones_last_and_mistakes_are_wrong(draw, operating_points):
    test = draw(2)
    f = find(test, operating_points, ORIGIN, NAMES)
    exits = f.evaluation.exits
    assert {s.exit for s in f.easy} == {exits.min()} and {s.exit for s in f.hard} == {exits.max()}
    surest = np.flatnonzero(exits == exits.min())
    assert f.easy[0].row == surest[test.scores[surest, exits.min()].argmax()]
    assert f.mistakes and all(s.answer != s.label for s in f.mistakes)
    assert [s.exit for s in f.mistakes] == sorted(s.exit for s in f.mistakes)
    for group in (f.easy, f.hard, f.mistakes):
        assert max(np.bincount([s.label for s in group])) <= 2
        for s in group:
            assert (s.label, s.answer, s.full) == (
                test.labels[s.row],
                test.answers[s.row, s.exit],
                test.answers[s.row, -1],
            )


def test_with_one_exit_samples_stand_in_the_order_of_the_table(draw):
    test = draw(2).first(1)
    exits = np.zeros(test.samples, int)
    rows = [sample.row for sample in easiest(test, exits)]
    assert rows == sorted(rows) and rows[0] == 0 and len(rows) == SHOWN
    assert hardest(test, exits)[0].row == test.samples - 1
    assert all(sample.spent == 1 and not test.correct[sample.row, 0] for sample in confident_mistakes(test, exits))


def test_of_one_class_few_are_shown(draw):
    test = draw(2)
    test = test.take(np.flatnonzero(test.labels == 3))
    exits = leaving(test.scores, np.zeros(test.exits - 1))
    assert len(easiest(test, exits)) == len(hardest(test, exits)) == PER_CLASS


def test_the_spectrum_of_a_class_is_the_mean_of_its_samples():
    spectra, labels = np.random.default_rng(0).random((6, 4)), np.array([0, 2, 2, 0, 2, 0])
    means = class_spectra(Samples(spectra=spectra), labels, 3)
    assert means[0] == pytest.approx(spectra[[0, 3, 5]].mean(0)) and means[2] == pytest.approx(
        spectra[[1, 2, 4]].mean(0)
    )
    assert np.isnan(means[1]).all() and class_spectra(Samples(), labels, 3) is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"names": ["a"]}, "got 1 names for 2 test samples"),
        ({"pictures": np.zeros((2, 4, 4))}, r"must be uint8 .* got float64 of shape \(2, 4, 4\)"),
        ({"pictures": np.zeros((2, 4, 4, 4), np.uint8)}, r"\(N, H, W, 3\), got uint8 of shape"),
        ({"spectra": np.zeros((2, 5))}, "wavelengths of shape None"),
        ({"spectra": np.zeros((2, 5)), "wavelengths_nm": np.arange(4)}, r"wavelengths of shape \(4,\)"),
        ({"spectra": np.zeros((2, 1)), "wavelengths_nm": np.arange(1)}, "two bands or more"),
        ({"positions": np.array([[0, 0], [24, 0]])}, "inside the scene of 24 x 30 pixels"),
        ({"positions": np.array([[0, 0], [0, -1]])}, "inside the scene"),
    ],
)
def test_samples_that_do_not_fit_are_refused(wrong, said):
    with pytest.raises(DataError, match=said):
        Samples(**wrong).check(2, scene((24, 30)))


def test_positions_are_free_where_there_is_no_scene():
    Samples(positions=np.array([[99, 0]]), names=["a"]).check(1, None)
    with pytest.raises(DataError, match="inside the scene"):
        Samples(positions=np.array([[99, 0]]), names=["a"]).check(1, scene())
