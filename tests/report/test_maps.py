import re
from dataclasses import replace

import numpy as np
import pytest

from dynanet.report import Samples, page
from dynanet.report.colours import css
from dynanet.report.maps import scene_section
from tests.report.pages import NAMES, Reader, scene, whole


@pytest.mark.parametrize(
    ("about", "said"),
    [("", "The scene has 30 × 24 pixels. At"), ("A field", "A field. The scene has 30 × 24 pixels. At")],
)
def test_the_size_of_a_scene_is_said_once(draw, operating_points, about, said):
    text = Reader(page(whole(draw, operating_points, scene=replace(scene(), about=about)))).said
    assert said in text and text.count("30 × 24") == 1


def test_marks_stay_inside_the_picture(draw, operating_points):
    corners = np.array([[0, 0], [0, 29], [23, 0], [23, 29]])[np.arange(400) % 4]
    text = page(whole(draw, operating_points, shown=Samples(positions=corners)))
    at = 'viewBox="0 0 30 24"'
    overlay = text[text.index(at) : text.index("</svg>", text.index(at))]
    line = 0.9 * 0.014 * 30 / 2
    circles = re.findall('<circle class="place" cx="([^"]*)" cy="([^"]*)" r="([^"]*)"', overlay)
    spots = [
        tuple(map(float, pair.split(","))) for said in re.findall('points="([^"]*)"', overlay) for pair in said.split()
    ]
    for x, y, radius in np.array(circles, float):
        spots += [(x - radius, y - radius), (x + radius, y + radius)]
    assert len(spots) > 30
    low, high = np.min(spots, 0), np.max(spots, 0)
    assert (low >= line - 0.06).all() and (high <= np.array([30, 24]) - line + 0.06).all()  # written with few digits


def test_a_large_scene_stays_below_two_megabytes(draw, operating_points):
    text = page(whole(draw, operating_points, scene=scene((800, 800)), shown=None))  # noise: no picture takes more
    assert "one in 2 drawn" in Reader(text).said
    assert len(text.encode()) < 2_000_000


def test_without_a_scene_there_are_no_maps(draw, operating_points):
    assert scene_section(whole(draw, operating_points, scene=None)) is None


def test_colours_of_the_scene_itself_go_before_made_up_ones(draw, operating_points):
    own = np.arange(15, dtype=np.uint8).reshape(5, 3) + 17
    made = scene_section(whole(draw, operating_points, scene=replace(scene(), colours=own)))
    usual = scene_section(whole(draw, operating_points))
    for c, name in enumerate(NAMES):
        entry = f'background:{css(own[c])};color:#ffffff">{c + 1}</span><span>{name}</span>'
        assert entry in made and entry not in usual
