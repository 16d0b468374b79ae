import re

import pytest

from dynanet.report.blocks import (
    LEVELS,
    colour_bar,
    compute_colour,
    facts,
    length_bar,
    parts_bar,
    swatch,
    table,
)
from dynanet.report.colours import css, ramp
from dynanet.report.markup import tag
from tests.report.pages import Reader


def test_a_table_has_a_cell_for_every_title_and_marks_one_row():
    made = table(["", "a < b"], [["x", 1], ["y", tag("td.name", "2")]], "a caption", marked=1)
    read = Reader(made)
    names = [name for name, _ in read.elements]
    assert (names.count("th"), names.count("td"), names.count("tr")) == (2, 4, 3)
    assert [at for name, at in read.elements if name == "tr" and at] == [{"class": "explained"}]
    assert "a < b" in read.said and made.count("<td class=") == 1 and "--columns" not in made


def test_a_table_with_a_wide_last_cell_folds():
    made = table(["a", "b", "wide"], [["x", 1, tag("td.wide", "-")]], "")
    assert '<table class="folding" style="--columns:1">' in made and '<th class="wide"' in made


def test_what_is_empty_is_not_given():
    read = Reader(facts({"date": "", "commit": None, "seed": "0"}))
    assert read.said.split() == "date not given commit not given seed 0".split()


def test_the_colour_of_a_share_stays_on_the_ramp():
    ends = css(ramp(LEVELS)[0]), css(ramp(LEVELS)[-1])
    assert (compute_colour(0.0)[0], compute_colour(1.0)[0]) == ends
    assert (compute_colour(-0.2), compute_colour(1.7)) == (compute_colour(0.0), compute_colour(1.0))
    assert compute_colour(0.0)[1] == "#ffffff" and compute_colour(1.0)[1] == "#000000", "readable on both"


def test_parts_of_a_bar_are_named_and_empty_ones_left_out():
    made = parts_bar([0.5, 0.0, 0.05, 0.45], [0.1, 0.2, 0.5, 1.0], ["one", "two", "three", "four"])
    assert re.findall('title="([^"]*)"', made) == ["one: 50.0 %", "three: 5.0 %", "four: 45.0 %"]
    assert Reader(made).said.split() == ["50", "45"], "no number where it does not fit"
    with pytest.raises(ValueError, match="zip"):
        parts_bar([1.0], [0.5, 0.5], ["one"])


@pytest.mark.parametrize(("share", "width"), [(0.0, "0.0"), (0.25, "25.0"), (1.3, "100.0")])
def test_a_bar_is_as_long_as_its_share_and_never_longer_than_the_whole(share, width):
    assert f"width:{width}%;background:{compute_colour(share)[0]}" in length_bar(share)


def test_legends_name_their_colours_and_ticks_are_evenly_spaced():
    assert swatch("#123456", "a & b").endswith("</span>a &amp; b</li>") and "background:#123456" in swatch(
        "#123456", ""
    )
    bar = colour_bar(["0", "half", "all"], "a scale")
    assert re.findall("left:([0-9]+)%", bar) == ["0", "50", "100"] and bar.count("#") == 9
    assert Reader(bar).said.split() == ["0", "half", "all", "a", "scale"]
