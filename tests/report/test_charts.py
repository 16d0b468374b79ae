import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from dynanet.report.charts import HEIGHT, WIDTH, Axis, Series, mark, scatter, spectrum


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


def test_every_mark_has_its_shape_and_says_what_it_is():
    circle, square = mark("circle", "full", 3, 4, "a < b"), mark("square", "full", 3, 4, size=2)
    assert circle == '<circle class="full" cx="3" cy="4" r="5"><title>a &lt; b</title></circle>'
    assert square == '<polygon class="full" points="1.0,2.0 5.0,2.0 5.0,6.0 1.0,6.0"></polygon>'


def test_a_spectrum_is_interrupted_where_bands_are_missing():
    nm = np.array([400.0, 410, 420, 600, 610])
    whole = spectrum(np.arange(400.0, 450, 10), nm, nm, 400, 610, "")
    broken = spectrum(nm, nm, nm, 400, 610, "")
    assert whole.count("polyline") == 2 * 2 and broken.count("polyline") == 2 * 4  # begin and end, sample and class
    assert "400 nm" in broken and "610 nm" in broken
