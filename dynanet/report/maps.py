"""Maps of a scene: colours, ground truth, predictions, errors and compute."""

import numpy as np

from dynanet.report.blocks import colour_bar, length_bar, swatch, table
from dynanet.report.charts import mark
from dynanet.report.colours import class_colours, css, ink, ramp
from dynanet.report.findings import Findings
from dynanet.report.markup import Markup, join, tag
from dynanet.report.pictures import coloured, data_uri, dimmed, places, stride
from dynanet.report.words import maybe_percent, percent

LEVELS = 64  # of the map of compute
CORRECT = np.array([150, 190, 215], np.uint8)
WRONG = np.array([204, 60, 0], np.uint8)


def scene_section(f: Findings) -> Markup | None:
    """The maps side by side, with one legend, and a table of the parts of the scene."""
    scene = f.scene
    if scene is None:
        return None
    step = stride(*scene.truth.shape)
    thin = (slice(None, None, step), slice(None, None, step))
    colours = class_colours(len(f.class_names)) if scene.colours is None else scene.colours
    truth = scene.truth[thin]
    predicted = scene.predicted[thin]
    labelled = scene.labelled[thin]
    most = max(1.0, float(scene.spent.max()))
    spent = np.round(scene.spent[thin] / most * (LEVELS - 1)).astype(int)
    verdict = np.where(scene.checked[thin], (predicted != truth).astype(int), -1)
    numbers = _numbers(np.where(labelled, predicted, -1), colours)
    hatched = dimmed(coloured(predicted, colours), ~labelled)
    dim = "Faint and hatched: unlabelled, so that it cannot be checked."
    marks = "The samples below: ○ easiest, □ hardest, △ most confident mistakes." if _marked(f) else ""
    exits = ", ".join(percent(each.macs / f.full.macs, 0) for each in f.exits)
    scale = colour_bar(
        [percent(tick * most, 0) for tick in (0, 0.25, 0.5, 0.75, 1)],
        f"MACs of every pixel, as a share of the full model's. Exits: {exits}.",
    )
    maps = [
        _map("True colours", scene.colour[thin], _marks(f, step), tag("figcaption", marks)),
        _map("Compute spent", coloured(spent, ramp(LEVELS)), None, scale),
        _map("Predicted", hatched, numbers, tag("figcaption", dim)),
        _map(
            "Ground truth", coloured(truth, colours), _numbers(truth, colours), tag("figcaption", "Empty: unlabelled.")
        ),
        _map("Errors", coloured(verdict, np.stack([CORRECT, WRONG])), None, _verdict_key(f)),
        tag("div", tag("h3", "Classes"), _classes(f, colours)),
    ]
    size = f"The scene has {scene.truth.shape[1]} × {scene.truth.shape[0]} pixels"
    drawn = f", one in {step} drawn in each direction" if step > 1 else ""
    about = f"{scene.about + '. ' if scene.about else ''}{size}{drawn}. At the operating point “{f.evaluation.name}”."
    return join([tag("h2", "The scene"), tag("p", about), tag("div.maps", *maps), _shares(f)])


def _map(title: str, pixels: np.ndarray, overlay: Markup | None, below: Markup) -> Markup:
    picture = tag("img.pixels", at={"src": data_uri(pixels), "alt": f"Map: {title}"})
    return tag("figure", tag("h3", title), tag("div.map", picture, overlay), below)


def _numbers(labels: np.ndarray, colours: np.ndarray) -> Markup:
    """Class numbers on the large fields, as many classes are hard to distinguish by colour."""
    height, width = labels.shape
    font = 0.042 * max(height, width)
    texts = []
    for row, column, label in places(labels, apart=1.4 * font, least=max(3, round(0.55 * font))):
        style = f"font-size:{font:.1f}px;stroke-width:{0.2 * font:.2f}px;stroke:{css(colours[label])}"
        at = {"x": column + 0.5, "y": row + 0.5, "style": f"{style};fill:{ink(colours[label])}"}
        texts.append(tag("text", label + 1, at=at))
    return tag("svg", *texts, at={"viewBox": f"0 0 {width} {height}", "aria-hidden": "true"})


def _marked(f: Findings) -> bool:
    return f.shown is not None and f.shown.positions is not None


def _marks(f: Findings, step: int) -> Markup | None:
    """Marks at the samples of the cards; at the edges they are moved inwards until they are whole."""
    if f.shown is None or f.shown.positions is None or f.scene is None:
        return None
    height, width = f.scene.truth[::step, ::step].shape
    size = 0.014 * max(height, width)
    reach = np.minimum(1.75 * size, np.array([height, width]) / 2)  # to the tips of a triangle, its line included
    signs = []
    for shape, samples in (("circle", f.easy), ("square", f.hard), ("triangle", f.mistakes)):
        for sample in samples:
            centre = (f.shown.positions[sample.row] + 0.5) / step
            row, column = np.clip(centre, reach, [height, width] - reach).tolist()
            signs.append(mark(shape, "place", column, row, f.class_names[sample.label], size))
    under = tag("g", *signs, at={"fill": "none", "stroke": "#000000", "stroke-width": 0.9 * size})
    over = tag("g", *signs, at={"fill": "none", "stroke": "#ffffff", "stroke-width": 0.35 * size})
    return tag("svg", under, over, at={"viewBox": f"0 0 {width} {height}", "aria-hidden": "true"})


def _verdict_key(f: Findings) -> Markup:
    assert f.scene is not None, "callers check"
    items = [swatch(css(CORRECT), "test pixel, correct"), swatch(css(WRONG), "test pixel, wrong")]
    left_out = "" if f.scene.tested is None else "Empty: unlabelled, or used for training or calibration."
    return join([tag("ul.key", *items), tag("figcaption", left_out)])


def _classes(f: Findings, colours: np.ndarray) -> Markup:
    entries = []
    for c, name in enumerate(f.class_names):
        style = f"background:{css(colours[c])};color:{ink(colours[c])}"
        entries.append(tag("li", tag("span.number", c + 1, at={"style": style}), tag("span", name)))
    return tag("ul.classes", *entries)


def _shares(f: Findings) -> Markup:
    rows = [
        [
            each.name,
            f"{each.pixels:,}",
            percent(each.spent),
            maybe_percent(each.right),
            tag("td.wide", length_bar(each.spent)),
        ]
        for each in f.scene_shares
    ]
    titles = ["pixels", "count", "mean MACs, of full", "accuracy on test pixels", ""]
    said = "A pixel lies at an edge if one of its eight neighbours has another label, or none."
    return join([tag("h3", "Compute by part of the scene"), table(titles, rows, said)])
