import numpy as np
import pytest

from dynanet.report.colours import class_colours, css, distances, ink, ramp

JUST_VISIBLE = 0.02  # in Oklab


def test_the_ramp_grows_lighter_in_even_steps():
    grey = (ramp(33) / 255) ** 2.2 @ [0.2126, 0.7152, 0.0722]
    lightness = np.diff(np.cbrt(grey))
    assert (lightness > 0).all() and lightness.max() < 3 * lightness.min()
    neighbours = np.diagonal(distances(ramp(11)), 1)
    assert neighbours.min() > 2 * JUST_VISIBLE  # every tenth is told apart, without red or green cones too


@pytest.mark.parametrize(("classes", "times", "blind"), [(2, 20, 15), (10, 10, 5), (16, 8, 4), (20, 7, 3)])
def test_class_colours_differ_also_without_red_or_green_cones(classes, times, blind):
    colours = class_colours(classes)
    others = ~np.eye(classes, dtype=bool)
    assert distances(colours, blind=False)[others].min() > times * JUST_VISIBLE
    assert distances(colours)[others].min() > blind * JUST_VISIBLE
    assert (np.ptp(colours.astype(int), axis=1) > 30).all()  # none is grey: that is for pixels without a class
    for paper in ([255, 255, 255], [20, 23, 27]):
        assert distances(np.array([paper, *colours]), blind=False)[0, 1:].min() > 5 * JUST_VISIBLE


@pytest.mark.parametrize("classes", [1, 41, 300])
def test_any_number_of_classes_has_colours(classes):
    assert class_colours(classes).shape == (classes, 3)


def test_ink_is_readable_on_every_colour():
    for colour in [*ramp(20), *class_colours(20)]:
        light = (colour / 255) ** 2.2 @ [0.2126, 0.7152, 0.0722]
        contrast = (light + 0.05) / 0.05 if ink(colour) == "#000000" else 1.05 / (light + 0.05)
        assert contrast > 4.3, css(colour)


def test_a_colour_is_written_in_hex():
    assert css(np.array([0, 10, 255], np.uint8)) == "#000aff"


def test_distances_are_symmetric_and_colour_blind_ones_no_larger():
    colours = np.random.default_rng(0).integers(0, 256, (12, 3), dtype=np.uint8)
    blind, normal = distances(colours), distances(colours, blind=False)
    assert np.allclose(normal, normal.T) and not np.diagonal(normal).any()
    assert (blind <= normal).all() and (blind < normal).any()
