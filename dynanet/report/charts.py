"""Charts as inline SVG, coloured by the style sheet of the page, so that they follow light, dark and print.

Marks differ in shape as well as in colour. Charts are narrow, and side by side where there is room, so that their text
has about the size of the page's on a phone too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynanet.report.markup import Markup, tag

WIDTH = 420.0
HEIGHT = 320.0
LEFT = 46.0  # margins
RIGHT = 14.0
TOP = 26.0
BOTTOM = 46.0
FONT = 13.0
LETTER = 0.56 * FONT  # mean width, for the boxes of labels
SIDES = ((1, 0), (0, -1), (0, 1), (-1, 0), (1, -1), (1, 1), (-1, -1), (-1, 1))  # where the label of a mark may be

CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
    "triangle": [(0, -1.25), (1.2, 0.95), (-1.2, 0.95)],
}


@dataclass(frozen=True)
class Series:
    """A series of points (x, y).

    Attributes:
        name: in the legend.
        look: class in the style sheet.
        points: in the units of the axes.
        mark: circle, square, diamond or triangle; "" for none.
        line: join the points.
        labels: one per point, or empty.
    """

    name: str
    look: str
    points: Sequence[tuple[float, float]]
    mark: str = ""
    line: bool = False
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        title: with the unit.
        log: logarithmic.
        zero: start at 0.
        most: the highest end.
    """

    title: str
    log: bool = False
    zero: bool = False
    most: float = math.inf


def scatter(x: Axis, y: Axis, series: Sequence[Series], described: str) -> Markup:
    """A chart of points and lines, with the legend above it.

    Args:
        x: the horizontal axis.
        y: the vertical axis.
        series: later ones are drawn over earlier ones.
        described: alternative text.
    """
    series = [each for each in series if each.points]
    everything = np.array([point for each in series for point in each.points])
    across = _Scale(x, everything[:, 0], LEFT, WIDTH - RIGHT)
    up = _Scale(y, everything[:, 1], HEIGHT - BOTTOM, TOP)
    drawn: list[Markup | None] = [_grid(across, up)]
    taken: list[tuple[float, float, float, float]] = []
    for each in series:
        places = [(across(a), up(b)) for a, b in each.points]
        taken += [(a - 6, b - 6, a + 6, b + 6) for a, b in places if each.mark]
        if each.line:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            drawn.append(tag(f"polyline.{each.look}", at={"points": path}))
        if each.mark:
            drawn += [mark(each.mark, each.look, a, b, said) for (a, b), said in zip(places, _said(each), strict=True)]
    for each in reversed(series):  # labels of the top series are placed first
        for (a, b), label in zip(each.points, each.labels, strict=bool(each.labels)):
            if label:
                drawn.append(_label(across(a), up(b), label, each.look, taken))
    box = {"viewBox": f"0 0 {WIDTH:g} {HEIGHT:g}", "role": "img", "aria-label": described}
    return tag("div.chart", _legend(series), tag("svg", *drawn, at=box))


def mark(shape: str, look: str, x: float, y: float, said: str = "", size: float = 5.0) -> Markup:
    """A mark centred at (x, y); `said` is its tooltip."""
    title = [tag("title", said)] if said else []
    if shape == "circle":
        return tag(f"circle.{look}", *title, at={"cx": float(x), "cy": float(y), "r": float(size)})
    points = " ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in CORNERS[shape])
    return tag(f"polygon.{look}", *title, at={"points": points})


def spectrum(nm: np.ndarray, values: np.ndarray, usual: np.ndarray, low: float, high: float, described: str) -> Markup:
    """A small spectrum over the mean of its class, interrupted at gaps between bands.

    Args:
        nm: (bands,) wavelengths, rising.
        values: (bands,) of the sample.
        usual: (bands,) of its class.
        low: the lowest value of the axis.
        high: the highest value of the axis.
        described: alternative text.
    """
    width = 200.0
    height = 128.0
    foot = 18.0
    xs = (nm - nm[0]) / (nm[-1] - nm[0]) * (width - 4) + 2
    gaps = np.flatnonzero(np.diff(nm) > 3 * np.median(np.diff(nm))) + 1

    def lines(curve: np.ndarray, look: str) -> list[Markup]:
        ys = (height - foot - 2) * (1 - (curve - low) / (high - low)) + 1
        parts = np.split(np.arange(len(nm)), gaps)
        paths = [" ".join(f"{xs[i]:.1f},{ys[i]:.1f}" for i in part) for part in parts]
        return [tag(f"polyline.{look}", at={"points": path}) for path in paths]

    ends = [
        tag("text", f"{nm[0]:.0f} nm", at={"x": 2.0, "y": height - 3}),
        tag("text", f"{nm[-1]:.0f} nm", at={"x": width - 2, "y": height - 3, "text-anchor": "end"}),
        tag("line.axis", at={"x1": 2.0, "x2": width - 2, "y1": height - foot, "y2": height - foot}),
    ]
    box = {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": described}
    return tag("svg.spectrum", *ends, *lines(usual, "usual"), *lines(values, "sample"), at=box)


class _Scale:
    """Maps values to coordinates, with ticks at round numbers."""

    def __init__(self, axis: Axis, values: np.ndarray, start: float, end: float) -> None:
        self.axis = axis
        self.start = start
        self.end = end
        low = float(values.min())
        high = float(values.max())
        if axis.log:
            self.low = math.log10(low) - 0.06
            self.high = math.log10(high) + 0.06
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            self.ticks = [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]
            return
        spread = (high - low) or abs(high) or 1.0
        self.low = 0.0 if axis.zero else low - 0.06 * spread
        self.high = min(high + 0.08 * spread, axis.most)
        step = _round_step((self.high - self.low) / 7)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        self.ticks = [step * i for i in range(first, last + 1)]

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.axis.log else value
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(digit for digit in (1, 2, 2.5, 5, 10) if rough <= digit * power * (1 + 1e-9))


def _grid(across: _Scale, up: _Scale) -> Markup:
    left = across.start
    right = across.end
    bottom = up.start
    drawn = []
    for tick in up.ticks:
        y = up(tick)
        drawn.append(tag("line.grid", at={"x1": left, "x2": right, "y1": y, "y2": y}))
        drawn.append(tag("text.tick", f"{tick:.6g}", at={"x": left - 6, "y": y + 4.5, "text-anchor": "end"}))
    for tick in across.ticks:
        x = across(tick)
        drawn.append(tag("line.axis", at={"x1": x, "x2": x, "y1": bottom, "y2": bottom + 4}))
        drawn.append(tag("text.tick", f"{tick:.6g}", at={"x": x, "y": bottom + 18, "text-anchor": "middle"}))
    drawn.append(tag("line.axis", at={"x1": left, "x2": right, "y1": bottom, "y2": bottom}))
    drawn.append(tag("text", up.axis.title, at={"x": 2.0, "y": 12.0}))
    drawn.append(tag("text", across.axis.title, at={"x": right, "y": HEIGHT - 6, "text-anchor": "end"}))
    return tag("g", *drawn)


def _said(series: Series) -> list[str]:
    labels = list(series.labels) + [""] * (len(series.points) - len(series.labels))
    return [f"{label or series.name}: {x:.4g}, {y:.4g}" for (x, y), label in zip(series.points, labels, strict=True)]


def _label(x: float, y: float, text: str, look: str, taken: list[tuple[float, float, float, float]]) -> Markup | None:
    """The label next to its mark where there is room; None if there is not (a table has it)."""
    text = text if len(text) <= 22 else text[:21] + "…"
    width = LETTER * len(text)
    beside = [(x + right * (11 + width / 2) * (1 if not down else 0.9), down) for right, down in SIDES]
    pushed = min(max(x, LEFT + width / 2), WIDTH - 2 - width / 2)  # above or below, moved inwards
    for middle, down in [*beside, *((pushed, down) for down in (-1, 1, -2.2, 2.2))]:
        base = y + 4.5 + down * 14
        box = (middle - width / 2, base - FONT + 2, middle + width / 2, base + 3)
        inside = LEFT <= box[0] and box[2] <= WIDTH - 2 and TOP - 8 <= box[1] and box[3] <= HEIGHT - BOTTOM
        free = all(box[2] <= a or c <= box[0] or box[3] <= b or d <= box[1] for a, b, c, d in taken)
        if inside and free:
            taken.append(box)
            return tag(f"text.label.{look}", text, at={"x": middle, "y": base, "text-anchor": "middle"})
    return None


def _legend(series: Sequence[Series]) -> Markup:
    entries = []
    for each in series:
        line = [tag(f"polyline.{each.look}", at={"points": "1,8 27,8"})] if each.line else []
        sign = [mark(each.mark, each.look, 14.0, 8.0)] if each.mark else []
        swatch = tag("svg", *line, *sign, at={"viewBox": "0 0 28 16", "width": 28, "height": 16, "aria-hidden": "true"})
        entries.append(tag("li", swatch, each.name))
    return tag("ul.legend", *entries)
