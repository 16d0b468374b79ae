import errno
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from dynanet.calibrate.operating_point import choose, curve
from dynanet.core.budget import Budget
from dynanet.report import Origin, Point, Samples, SceneMaps, Timing, find, page, write_report

NAMES = ["wheat", "woods", "corn", "oats", "hay"]
HOSTILE = ["<script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>", "</style>&amp;", "\ud800\x00", "x" * 300]
ORIGIN = Origin(
    data="made up, seed 3",
    test="test pixels",
    held_out="validation pixels",
    held_out_samples=400,
    device="a small machine, 1 thread",
    versions={"torch": "2.13.0"},
    commit="84e119e",
    date="2026-11-24 14:03 UTC",
    more={"command": "dynanet report"},
)
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Reads the page: every element, its attributes, the text; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.said, self._open = [], "", []
        self.feed(text)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.said += data + " "


def scene(size: tuple[int, int] = (24, 30), seed: int = 0) -> SceneMaps:
    rng = np.random.default_rng(seed)
    truth = rng.integers(-1, 5, size)
    return SceneMaps(
        colour=rng.integers(0, 256, (*size, 3), dtype=np.uint8),
        predicted=np.where(truth < 0, 0, truth),
        spent=rng.choice([0.125, 0.25, 0.5, 1.0], size),
        truth=truth,
        tested=rng.random(size) < 0.5,
        about="A made-up place",
    )


def whole(draw, operating_points, names=NAMES, **given):
    rng = np.random.default_rng(0)
    shown = Samples(
        spectra=rng.random((400, 12)),
        wavelengths_nm=rng.permutation(np.linspace(400, 2500, 12)),
        unit="counts",
        positions=np.stack([rng.integers(0, 24, 400), rng.integers(0, 30, 400)], 1),
    )
    all_of_it = {
        "line": curve(draw(1), points=7),
        "static": [Point("small CNN", 3e6, 0.7, 0.02), Point("SVM", None, 0.65)],
        "timing": Timing("sparse, eager, batch 64, 1 thread", 0.04, [0.03, 0.02, None]),
        "shown": shown,
        "scene": scene(),
    }
    return find(draw(2), operating_points, ORIGIN, names, **all_of_it | given)


def test_the_page_says_every_figure_that_was_asked_for(draw, operating_points):
    f = whole(draw, operating_points)
    said = Reader(page(f)).said
    for evaluation in f.evaluations:
        assert evaluation.name in said
        assert f"{100 * evaluation.outcome.accuracy:.1f} %" in said
        assert f"{100 * evaluation.outcome.macs / 8e6:.1f} % of full" in said
        assert f"{100 * evaluation.random:.1f} %" in said
    assert f"{100 * f.full.accuracy:.1f} %" in said
    assert f"{0.04 / 0.03:.2f} times as fast" in said
    for known in (
        *NAMES,
        "small CNN",
        "SVM",
        "sparse, eager, batch 64, 1 thread",
        "A made-up place",
        "360 samples tested",
    ):
        assert known in said
    for origin in (
        ORIGIN.data,
        ORIGIN.test,
        ORIGIN.held_out,
        ORIGIN.device,
        "torch 2.13.0",
        ORIGIN.commit,
        ORIGIN.date,
    ):
        assert origin in said
    for title in (
        "Compute spent",
        "Predicted",
        "Ground truth",
        "True colours",
        "Limits of these figures",
        "How to read",
    ):
        assert title in said
    for sample in (*f.easy, *f.hard, *f.mistakes):
        assert "row {}, column {}".format(*f.shown.positions[sample.row]) in said


def test_the_page_loads_nothing_and_runs_nothing(draw, operating_points):
    text = page(whole(draw, operating_points))
    read = Reader(text)
    assert not {tag for tag, _ in read.elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in read.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:image/png;base64,") or name not in attributes
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert not re.search("(?i)https?://|//cdn", re.sub("data:image/png;base64,[A-Za-z0-9+/=]+", "", text))
    assert len(text.encode()) < 500_000


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


@pytest.mark.parametrize("part", ["scene", "shown", "line", "static", "timing"])
def test_whatever_is_missing_the_rest_is_there(draw, operating_points, part):
    empty = () if part in ("line", "static") else None
    said = Reader(page(whole(draw, operating_points, **{part: empty}))).said
    assert "Operating points" in said and "nan" not in said.lower().split()


def test_the_barest_report(draw, operating_points):
    f = find(draw(2, ms=False), operating_points[:1], Origin(data="made up", test="test"), NAMES)
    said = Reader(page(f)).said
    assert "Time was not measured" in said and "ms per sample" not in said
    assert "The scene" not in said and "Promised risks" not in said
    assert said.count("not given") >= 4


def test_pictures_of_samples_are_shown(draw, operating_points):
    pictures = np.random.default_rng(0).integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)
    names = [f"images/{i:04d}.png" for i in range(400)]
    f = whole(draw, operating_points, scene=None, shown=Samples(pictures=pictures, names=names))
    read = Reader(page(f))
    cards = len(f.easy) + len(f.hard) + len(f.mistakes)
    assert sum(tag == "img" for tag, _ in read.elements) == cards
    assert f"images/{f.hard[0].row:04d}.png" in read.said


def test_hostile_names_stay_text(draw, operating_points):
    origin = Origin(data=HOSTILE[0], test=HOSTILE[1], device=HOSTILE[2], more={HOSTILE[0]: HOSTILE[1]})
    static = [Point(name, 1e6 * (i + 1), 0.5) for i, name in enumerate(HOSTILE)]
    shown = Samples(names=[HOSTILE[i % 3] for i in range(400)])
    f = find(draw(2), operating_points, origin, HOSTILE, title=HOSTILE[0], static=static, shown=shown, scene=scene())
    text = page(f)
    read = Reader(text)
    assert not {tag for tag, _ in read.elements} & {"script"}
    assert all(attributes["src"].startswith("data:") for tag, attributes in read.elements if tag == "img")
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    assert HOSTILE[0] in read.said and text.count("</style>") == 1
    text.encode()


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


def test_a_large_scene_stays_below_two_megabytes(draw, operating_points):
    text = page(whole(draw, operating_points, scene=scene((800, 800)), shown=None))  # noise: no picture takes more
    assert "one in 2 drawn" in Reader(text).said
    assert len(text.encode()) < 2_000_000


def test_one_file_is_written_whole_or_not_at_all(draw, operating_points, tmp_path, monkeypatch):
    f = whole(draw, operating_points)
    write_report(f, tmp_path / "report.html")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    before = (tmp_path / "report.html").read_bytes()
    assert before.decode() == page(f)

    def full_disk(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(find(draw(3), operating_points, ORIGIN, NAMES), tmp_path / "report.html")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == before
