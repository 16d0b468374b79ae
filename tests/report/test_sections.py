import re
from dataclasses import replace

import numpy as np

from dynanet.calibrate.operating_point import choose
from dynanet.core.budget import Budget
from dynanet.report import find, page
from dynanet.report.sections import classes_section, origin_section, promise_section, reading_section
from tests.report.pages import NAMES, ORIGIN, Reader, whole


def test_the_line_below_the_title_says_nothing_twice_and_no_python(draw, operating_points):
    origin = replace(
        ORIGIN, model="staged", arguments={"widths": [16, 32], "stem_stride": 1}, timed="batch 64, 1 thread"
    )
    text = page(whole(draw, operating_points, title=ORIGIN.data, timing=None)) + page(
        find(draw(2), operating_points, origin, NAMES, title="A title")
    )
    same, other = re.findall('</h1><p class="soft">(.*?)</p>', text)
    assert ORIGIN.data not in same and ORIGIN.device in same
    assert other.startswith(f"{ORIGIN.data} · staged (widths=[16, 32], stem_stride=1) · ")
    assert text.count("(batch 64, 1 thread)") >= 2  # beside the answer, and among the origins


def test_everything_may_leave_at_once_or_never(draw):
    held_out = draw(1)
    at_once, never = choose(held_out, Budget(macs=1e6)), choose(held_out, Budget(cap_macs=8e6))
    test = draw(2)
    for point in (at_once, never):
        f = find(test, [point], ORIGIN, NAMES)
        assert max(each.share for each in f.exits) == 1
        Reader(page(f))
    refused = choose(held_out.take(np.arange(20)), Budget(risk=0.01))
    assert "Not promised." in Reader(page(find(test, [refused], ORIGIN, NAMES))).said


def test_there_are_promises_only_where_a_risk_was_asked_for(draw, operating_points):
    assert promise_section(find(draw(2), operating_points[:2], ORIGIN, NAMES)) is None
    said = Reader(promise_section(find(draw(2), operating_points, ORIGIN, NAMES))).said
    assert "Promised." in said and "at most 10 % of samples, with confidence 90 %" in said


def test_classes_without_a_test_sample_are_named(draw, operating_points):
    test = draw(2)
    test = test.take(np.flatnonzero(test.labels < 3))
    said = Reader(classes_section(find(test, operating_points, ORIGIN, NAMES))).said
    assert "Without a test sample: oats, hay." in said
    assert "Without" not in Reader(classes_section(find(draw(2), operating_points, ORIGIN, NAMES))).said


def test_limits_of_a_scene_are_those_of_scenes_only(draw, operating_points):
    of_a_scene, of_none = (
        Reader(reading_section(whole(draw, operating_points, **more))).said for more in ({}, {"scene": None})
    )
    assert "unlabelled pixels" in of_a_scene and "unlabelled pixels" not in of_none and ORIGIN.held_out in of_none


def test_an_origin_lists_all_that_is_known(draw, operating_points):
    said = Reader(origin_section(find(draw(2), operating_points, ORIGIN, NAMES))).said
    for known in ("validation pixels (400 samples)", "test pixels (400 samples, 5 classes)", "command dynanet report"):
        assert known in " ".join(said.split())
