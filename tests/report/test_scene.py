import numpy as np
import pytest

from dynanet.core.errors import DataError
from dynanet.report import SceneMaps
from dynanet.report.scene import where_in_scene


def two_fields() -> SceneMaps:
    """A left and a right field of 6 x 4 pixels, an unlabelled strip between; mistakes in the first row cost all."""
    truth = np.full((6, 10), -1)
    truth[:, :4], truth[:, 6:] = 0, 1
    predicted = np.where(truth < 0, 0, truth)
    predicted[0, :4] = 1
    spent = np.where(predicted != truth, 1.0, 0.25)
    return SceneMaps(np.zeros((6, 10, 3), np.uint8), predicted, spent, truth, tested=np.arange(10) < np.full((6, 1), 4))


def test_means_are_those_of_the_parts():
    shares = {each.name: each for each in where_in_scene(two_fields())}
    assert shares["whole scene"].pixels == 60
    assert shares["unlabelled"].pixels == 12 and shares["unlabelled"].spent == 1.0
    assert shares["test, correct"].pixels == 20 and shares["test, correct"].spent == 0.25
    assert shares["test, wrong"].pixels == 4 and shares["test, wrong"].spent == 1.0
    edge, inside = shares["labelled, at the edge of a field"], shares["labelled, inside a field"]
    assert edge.pixels == 12 and inside.pixels == 36  # the edge of the scene is no edge of a field
    assert edge.right == pytest.approx(5 / 6) and inside.right == pytest.approx(15 / 18)  # of the left field alone


def test_nothing_counts_as_tested_that_is_not_labelled():
    scene = two_fields()
    everything = SceneMaps(scene.colour, scene.predicted, scene.spent, scene.truth, tested=np.ones((6, 10), bool))
    assert (everything.checked == (scene.truth >= 0)).all()
    assert (SceneMaps(scene.colour, scene.predicted, scene.spent, scene.truth).checked == everything.checked).all()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"predicted": np.zeros((5, 10), int)}, "predicted map must have the shape"),
        ({"predicted": np.full((6, 10), 2)}, "classes from 2 to 2"),
        ({"spent": np.full((6, 10), np.nan)}, "finite"),
        ({"spent": np.full((6, 10), -0.1)}, "not negative"),
        ({"colour": np.zeros((6, 10, 3))}, "must be uint8 of shape .6, 10, 3."),
        ({"truth": np.zeros(6, int)}, "height, width"),
        ({"colours": np.zeros((3, 3), np.uint8)}, "uint8 of shape .2, 3."),
    ],
)
def test_maps_that_do_not_fit_are_refused(changed, said):
    scene = two_fields()
    fields = {name: getattr(scene, name) for name in ("colour", "predicted", "spent", "truth")} | changed
    with pytest.raises(DataError, match=said):
        SceneMaps(**fields).check(2)
