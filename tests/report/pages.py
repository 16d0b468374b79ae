"""A page of made-up figures with all of its parts, and a reader that sees what a browser would."""

from html.parser import HTMLParser

import numpy as np

from dynanet.calibrate.operating_point import curve
from dynanet.report import Origin, Point, Samples, SceneMaps, Timing, find

NAMES = ["wheat", "woods", "corn", "oats", "hay"]
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
