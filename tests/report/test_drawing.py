import io
import xml.etree.ElementTree as ElementTree
from base64 import b64decode

import numpy as np
import pytest

from dynanet.report.charts import HEIGHT, WIDTH, Axis, Series, scatter
from dynanet.report.colours import class_colours, css, distances, ink, ramp
from dynanet.report.markup import Markup, join, tag
from dynanet.report.pictures import coloured, data_uri, depth, dimmed, places, stride
from dynanet.report.words import pairs, points, quantity

JUST_VISIBLE = 0.02  # in Oklab


def test_text_is_escaped_once_and_markup_never():
    inner = tag("b", "<&>")
    assert tag("p", inner, " & ", None, 3) == "<p><b>&lt;&amp;&gt;</b> &amp; 3</p>"
    assert tag("img", at={"alt": '" onerror="alert(1)', "src": None}) == '<img alt="&quot; onerror=&quot;alert(1)">'
    assert isinstance(join(["a", inner]), Markup)
    assert tag("p", "\x00\ud800") == "<p>\ufffd\ufffd</p>"


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


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 3), (3, 5, 4)])
def test_pictures_are_png_with_these_pixels(shape):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    kind, data = data_uri(pixels).split(",")
    assert kind == "data:image/png;base64"
    with image.open(io.BytesIO(b64decode(data))) as picture:
        assert (np.asarray(picture) == pixels).all()


def test_what_has_no_class_is_transparent_and_what_cannot_be_checked_is_faint():
    index = np.array([[0, 1, -1, 0, 1, 0, 1, 0]])
    rgba = coloured(index, np.array([[10, 20, 30], [40, 50, 60]], np.uint8))
    assert rgba[0, 1].tolist() == [40, 50, 60, 255] and rgba[0, 2, 3] == 0
    faint = dimmed(rgba, np.array([[False] * 3 + [True] * 5]))
    assert (faint[0, :3] == rgba[0, :3]).all() and (faint[0, 3:, 3] < 128).all()
    assert set(faint[0, 3:, 3]) == {0, 70}  # hatched


def test_large_pictures_are_thinned():
    assert stride(145, 145) == 1 and stride(400, 20) == 1 and stride(401, 20) == 2
    assert 5000 / stride(100, 5000) <= 400


def test_numbers_stand_inside_their_fields():
    labels = np.full((20, 30), -1)
    labels[2:13, 3:14], labels[2:13, 14:29], labels[16, 3:20] = 4, 2, 7
    inner = depth(labels)
    assert inner[7, 8] == 6 and inner[2, 3] == 1 and inner[0, 0] == 0 and inner.max() == 6
    found = places(labels, apart=9)
    assert {label for _, _, label in found} == {4, 2}  # the third field is too narrow
    assert all(labels[row, column] == label and inner[row, column] >= 3 for row, column, label in found)


def _boxes(chart: str) -> list[tuple[str, float, float]]:
    svg = ElementTree.fromstring(chart[chart.rindex("<svg ") : -len("</div>")])
    return [
        (text.text, float(text.get("x")), float(text.get("y")))
        for text in svg.iter("text")
        if "label" in text.get("class", "")
    ]


def test_labels_of_a_chart_do_not_overlap_and_stay_inside():
    rng = np.random.default_rng(0)
    spots = [(float(x), float(y)) for x, y in rng.uniform(0, 100, (25, 2))]
    names = [f"network {i}" for i in range(25)]
    chart = scatter(
        Axis("x", zero=True), Axis("y"), [Series("some", "static", spots, "circle", labels=names)], "a chart"
    )
    boxes = _boxes(chart)
    assert len(boxes) > 15
    width = 7.28 * len("network 1")
    for i, (_, x, y) in enumerate(boxes):
        assert width / 2 <= x <= WIDTH - width / 2 and 0 < y < HEIGHT
        for _, other_x, other_y in boxes[i + 1 :]:
            assert abs(x - other_x) >= width or abs(y - other_y) >= 13


@pytest.mark.parametrize("x", [0.0, 100.0])
def test_a_mark_at_the_edge_has_its_name_though_none_of_the_places_beside_it_is_free(x):
    name = "a network of 21 signs"
    wall = [(at, float(y)) for at in (45.5, 57.0) for y in np.linspace(0, 100, 30)] + [(100.0 - x, 50.0)]
    other = Series("other", "static", [(x, 50.0)], "circle", labels=[name])
    chart = scatter(Axis("x"), Axis("y"), [Series("wall", "alone", wall, "diamond"), other], "a chart")
    assert [text for text, _, _ in _boxes(chart)] == [name]


@pytest.mark.parametrize("values", [[5.0], [0.0], [1e-3, 1.0], [100.0, 100.0]])
def test_charts_of_few_or_equal_values_are_drawn(values):
    spots = [(value, value) for value in values]
    series = [Series("some", "full", spots, "square"), Series("none", "random", [], line=True)]
    chart = scatter(Axis("x", zero=True), Axis("y", most=100.5), series, "a chart")
    assert "nan" not in chart and "inf" not in chart
    assert "none" not in chart.split("aria-label")[0]


def test_a_wide_range_of_costs_has_ticks_in_powers_of_ten():
    chart = scatter(Axis("x", log=True), Axis("y"), [Series("some", "full", [(0.01, 1.0), (100.0, 2.0)], "circle")], "")
    assert all(f">{tick}</text>" in chart for tick in ("0.1", "1", "10"))


def test_figures_are_short_and_signed():
    assert [quantity(v) for v in (0, 7, 999.0, 1000.0, 929_400, 3.976e6, 1e10)] == [
        "0", "7", "999", "1.00 k", "929 k", "3.98 M", "10.0 G",
    ]  # fmt: skip
    assert [points(v) for v in (0.0004, -0.0004, 0.012, -0.059)] == ["0.0", "0.0", "+1.2", "−5.9"]


def test_arguments_are_pairs():
    given = {"widths": [16, (32, 64)], "rate": 0.10000000001, "kind": "se", "more": {"a": None}}
    assert pairs(given) == "widths=[16, [32, 64]], rate=0.1, kind=se, more=(a=None)"
    assert pairs({}) == ""
