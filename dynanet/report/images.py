"""The report of a task with answers per image position: figures, and images with maps of compute."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dynanet.report.blocks import colour_bar, facts, swatch, table
from dynanet.report.colours import class_colours, css, ramp
from dynanet.report.findings import Origin, Point
from dynanet.report.markup import Markup, join, tag
from dynanet.report.pictures import coloured, data_uri, stride
from dynanet.report.words import percent

LEVELS = 64  # of the map of compute


@dataclass(frozen=True)
class Box:
    """A box to draw: left, top, right, bottom in pixels, its class, and its score where it was found."""

    corners: Sequence[float]
    label: int
    score: float | None = None


@dataclass(frozen=True, eq=False)
class Shown:
    """An image of the report.

    Attributes:
        name: of the image.
        picture: (H, W) or (H, W, 3) uint8.
        macs: spent on it.
        units: (H, W), how many units ran for every pixel; None where nothing decided about positions or patches.
        found: detected boxes.
        truth: true boxes.
        labels: (H, W) int, the predicted class of every pixel; None for other tasks.
        known: (H, W) int, the true class; negative: void.
    """

    name: str
    picture: np.ndarray
    macs: float
    units: np.ndarray | None = None
    found: Sequence[Box] = ()
    truth: Sequence[Box] = ()
    labels: np.ndarray | None = None
    known: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class ImageFindings:
    """The figures of a report of images.

    Attributes:
        title: of the report.
        origin: where the figures come from.
        class_names: by index.
        full_macs: per image, everything computed.
        points: by name, the MACs and the figures of the network at its settings; a figure is a share.
        by_class: by figure, the value of every class; NaN where the class does not occur.
        beside: other facts, by name.
        static: other networks; their `accuracy` is the first figure.
        shown: images.
        setting: the name of the point that the classes and images are of.
    """

    title: str
    origin: Origin
    class_names: Sequence[str]
    full_macs: float
    points: Mapping[str, tuple[float, Mapping[str, float]]]
    by_class: Mapping[str, Sequence[float]] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)
    static: Sequence[Point] = ()
    shown: Sequence[Shown] = ()
    setting: str = ""


def image_sections(f: ImageFindings) -> list[Markup | None]:
    """The body of the page."""
    return [
        join([tag("h1", f.title), tag("p", f"{f.origin.data}: {f.origin.test}.")]),
        _figures(f),
        _classes(f),
        _images(f),
        join([tag("h2", "Origin of the figures"), facts(f.origin.known())]),
    ]


def _figures(f: ImageFindings) -> Markup:
    names = list(next(iter(f.points.values()))[1])
    rows = [
        [name, *(_share(figures[each]) for each in names), f"{macs:,.0f}", percent(macs / f.full_macs)]
        for name, (macs, figures) in f.points.items()
    ]
    rows += [
        [p.name, _share(p.accuracy), *["–"] * (len(names) - 1),
         *(["–", "–"] if p.macs is None else [f"{p.macs:,.0f}", percent(p.macs / f.full_macs)])]
        for p in f.static
    ]  # fmt: skip
    titles = ["", *names, "MACs per image", "of full MACs"]
    return join(
        [tag("h2", "Results"), table(titles, rows, f"On {f.origin.test}."), facts(f.beside) if f.beside else None]
    )


def _classes(f: ImageFindings) -> Markup | None:
    if not f.by_class:
        return None
    columns = zip(*f.by_class.values(), strict=True)
    rows = [[name, *(_share(v) for v in values)] for name, values in zip(f.class_names, columns, strict=True)]
    setting = f"{f.setting[:1].upper()}{f.setting[1:]}. " if f.setting else ""
    said = f"{setting}A dash: the class does not occur."
    return join([tag("h2", "Classes"), table(["class", *f.by_class], rows, said)])


def _images(f: ImageFindings) -> Markup | None:
    if not f.shown:
        return None
    colours = class_colours(len(f.class_names))
    most = max([1.0, *(float(s.units.max()) for s in f.shown if s.units is not None)])
    figures = []
    for each in f.shown:
        said = f"{each.name}: {percent(each.macs / f.full_macs)} of the full MACs."
        if each.found or each.truth:
            said += " Outlined: detected boxes." if each.found else " No box was detected."
        figures.append(_picture(each.picture, "found", _boxes(each.found, each.picture, colours, f.class_names), said))
        if each.units is not None:
            levels = np.round(each.units / most * (LEVELS - 1)).astype(int)
            outlines = _boxes(each.truth, each.picture, None, f.class_names)
            caption = f"Units per position{'; outlined: the true boxes' if each.truth else ''}."
            figures.append(_picture(ramp(LEVELS)[levels], "compute", outlines, caption))
        for what, labels in (("predicted", each.labels), ("true, void empty", each.known)):
            if labels is not None:
                nothing = _boxes((), each.picture, None, f.class_names)
                figures.append(_picture(coloured(labels, colours), what, nothing, f"Classes: {what}."))
    of_one = len(figures) // len(f.shown)  # so that the pictures of an image are side by side
    columns = {1: 3, 2: 4}.get(of_one, of_one)
    keys = [swatch(css(colour), name) for colour, name in zip(colours, f.class_names, strict=True)]
    maps = any(each.units is not None for each in f.shown)
    ticks = [f"{share * most:g}" for share in (0, 0.5, 1)]
    return join([
        tag("h2", "Maps of compute" if maps else "Images"),
        tag("p", "The first test images, without selection."),
        tag("ul.key", *keys) if any(s.found or s.truth or s.labels is not None for s in f.shown) else None,
        tag("figure", colour_bar(ticks, "Units that ran for a position.")) if maps else None,
        tag("div.maps.beside", *figures, at={"style": f"--columns:{columns}"}),
    ])  # fmt: skip


def _picture(pixels: np.ndarray, what: str, overlay: Markup, said: str) -> Markup:
    step = stride(*pixels.shape[:2])
    thin = np.ascontiguousarray(pixels[::step, ::step]).astype(np.uint8)
    picture = tag("img.pixels", at={"src": data_uri(thin), "alt": f"Map: {what}"})
    return tag("figure", tag("div.map", picture, overlay), tag("figcaption", said))


def _boxes(boxes: Sequence[Box], picture: np.ndarray, colours: np.ndarray | None, names: Sequence[str]) -> Markup:
    height, width = picture.shape[:2]
    drawn = []
    for box in boxes:
        left, top, right, bottom = box.corners
        said = names[box.label] + ("" if box.score is None else f", {box.score:.2f}")
        stroke = "#ffffff" if colours is None else css(colours[box.label])
        at = {"x": left, "y": top, "width": right - left, "height": bottom - top, "fill": "none", "stroke": stroke,
              "stroke-width": 0.006 * max(height, width)}  # fmt: skip
        drawn.append(tag("rect", tag("title", said), at=at))
    return tag("svg", *drawn, at={"viewBox": f"0 0 {width} {height}"})


def _share(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"
