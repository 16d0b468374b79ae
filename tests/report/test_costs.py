import re

from dynanet.report import Point, page
from tests.report.pages import Reader, whole


def charts(text: str) -> list[str]:
    """Each chart of the page with its legend, in its order: MACs, then milliseconds."""
    return re.findall('<div class="chart">.*?</svg></div>', text, re.DOTALL)


def test_static_networks_stand_beside_the_exits_in_both_charts(draw, operating_points):
    static = [Point("small CNN", 3e6, 0.7, 0.02), Point("SVM", None, 0.65, 0.01), Point("large CNN", 7e6, 0.85)]
    text = page(whole(draw, operating_points, static=static))
    against_macs, against_ms = charts(text)
    for chart, named, not_named in (
        (against_macs, "small CNN|large CNN", "SVM"),
        (against_ms, "small CNN|SVM", "large"),
    ):
        legend, drawn = chart.split("</ul>")
        assert "static networks" in legend
        assert len(re.findall('class="static"', drawn)) == 2
        assert set(re.findall('class="label static"[^>]*>([^<]*)<', drawn)) == set(named.split("|"))
        assert not_named not in drawn
    assert all(point.name in Reader(text).said for point in static)


def test_of_static_networks_nothing_is_said_where_there_are_none(draw, operating_points):
    text = page(whole(draw, operating_points, static=()))
    assert len(charts(text)) == 2
    assert "static" not in Reader(text).said and 'class="static"' not in text
