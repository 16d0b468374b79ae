import errno
import re

import pytest

from dynanet.report import Origin, Point, Samples, find, page, write_report
from tests.report.pages import NAMES, ORIGIN, Reader, scene, whole

HOSTILE = ["<script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>", "</style>&amp;", "\ud800\x00", "x" * 300]


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
