"""The scene: what it looks like, what is known, what was answered, what was wrong, and what was spent where."""

import numpy as np

from dynanet.inspect.charts import mark
from dynanet.inspect.colours import class_colours, css, ink, ramp
from dynanet.inspect.findings import Findings
from dynanet.inspect.markup import Markup, join, tag
from dynanet.inspect.pictures import coloured, data_uri, dimmed, places, stride

LEVELS = 64  # of the map of compute
RIGHT, WRONG = np.array([150, 190, 215], np.uint8), np.array([204, 60, 0], np.uint8)


def scene_section(f: Findings) -> Markup | None:
    """The maps side by side, with one legend, and the means of their parts."""
    scene = f.scene
    if scene is None:
        return None
    step = stride(*scene.truth.shape)
    thin = (slice(None, None, step), slice(None, None, step))
    colours = class_colours(len(f.class_names)) if scene.colours is None else scene.colours
    truth, labelled = scene.truth[thin], scene.labelled[thin]
    predicted = scene.predicted[thin]
    known = np.where(labelled, predicted, -1)
    most = max(1.0, float(scene.spent.max()))
    spent = np.round(scene.spent[thin] / most * (LEVELS - 1)).astype(int)
    verdict = np.where(scene.checked[thin], (predicted != truth).astype(int), -1)
    maps = [
        _map("True colours", scene.colour[thin], _marks(f, step), _marks_key(f)),
        _map("Compute spent", coloured(spent, ramp(LEVELS)), None, _colour_bar(most)),
        _map("Ground truth", coloured(truth, colours), _numbers(truth, colours), "Empty: unlabelled."),
        _map(
            "Predicted", dimmed(coloured(predicted, colours), ~labelled), _numbers(known, colours),
            "Faint and hatched: unlabelled, so nobody can say whether it is right.",
        ),
        _map("Right and wrong", coloured(verdict, np.stack([RIGHT, WRONG])), None, _verdict_key(f)),
    ]  # fmt: skip
    size = f"{scene.truth.shape[1]} × {scene.truth.shape[0]} pixels"
    drawn = f", every {step}th of them drawn in each direction" if step > 1 else ""
    about = f"{scene.about + ': ' if scene.about else ''}{size}{drawn}. Maps at the budget “{f.operations[f.explained].name}”."
    return join([
        tag("h2", "The scene"),
        tag("p", about),
        tag("div.maps", *maps, tag("div", tag("h3", "Classes"), _classes(f, colours))),
        _shares(f),
    ])  # fmt: skip


def _map(title: str, pixels: np.ndarray, overlay: Markup | None, below: object) -> Markup:
    picture = tag("img.pixels", at={"src": data_uri(np.ascontiguousarray(pixels)), "alt": f"Map: {title}"})
    below = tag("figcaption", below) if isinstance(below, str) and not isinstance(below, Markup) else below
    return tag("figure", tag("h3", title), tag("div.map", picture, overlay), below)


def _numbers(labels: np.ndarray, colours: np.ndarray) -> Markup:
    """Class numbers on the large fields: sixteen colours are more than an eye can tell apart."""
    height, width = labels.shape
    font = 0.042 * max(height, width)
    texts = []
    for row, column, label in places(labels, apart=1.3 * font, least=max(2, round(0.45 * font))):
        colour = colours[label]
        at = {"x": column + 0.5, "y": row + 0.5, "fill": ink(colour), "stroke": css(colour), "stroke-width": 0.2 * font}
        texts.append(tag("text", label + 1, at=at | {"style": f"font-size:{font:.1f}px;fill:{ink(colour)}"}))
    return tag("svg", *texts, at={"viewBox": f"0 0 {width} {height}", "aria-hidden": "true"})


def _marks(f: Findings, step: int) -> Markup | None:
    """Where the samples shown above lie."""
    if f.shown is None or f.shown.positions is None or f.scene is None:
        return None
    height, width = f.scene.truth[::step, ::step].shape
    size = 0.014 * max(height, width)
    signs = []
    for shape, look, samples in (
        ("circle", "easy", f.easy),
        ("square", "hard", f.hard),
        ("triangle", "missed", f.mistakes),
    ):
        for sample in samples:
            row, column = (f.shown.positions[sample.row] / step + 0.5).tolist()
            signs.append(mark(shape, look, column, row, f.class_names[sample.label], size))
    lines = {"fill": "none", "stroke-width": 0.35 * size, "style": "paint-order:stroke"}
    halo = tag("g", *signs, at=lines | {"stroke": "#000000", "stroke-width": 0.9 * size})
    return tag("svg", halo, tag("g", *signs, at=lines | {"stroke": "#ffffff"}),
               at={"viewBox": f"0 0 {width} {height}", "aria-hidden": "true"})  # fmt: skip


def _marks_key(f: Findings) -> object:
    if f.shown is None or f.shown.positions is None:
        return ""
    return "Of the samples shown above: ○ the easiest, □ the hardest, △ the surest mistakes."


def _verdict_key(f: Findings) -> Markup:
    assert f.scene is not None, "callers check"
    new = "" if f.scene.tested is None else " Labelled pixels of the other parts are left out: the model has seen them."
    entries = [(RIGHT, "test pixel, right"), (WRONG, "test pixel, wrong")]
    items = [tag("li", tag("span.swatch", at={"style": f"background:{css(colour)}"}), said) for colour, said in entries]
    return join([tag("ul.key", *items), tag("figcaption", new) if new else None])


def _colour_bar(most: float) -> Markup:
    stops = ",".join(css(colour) for colour in ramp(9))
    ticks = [0, 0.25, 0.5, 0.75, 1] if most == 1 else [0, 0.5 * most, most]
    texts = [tag("span", f"{100 * tick:.0f} %", at={"style": f"left:{100 * tick / most:.1f}%"}) for tick in ticks]
    bar = tag("div.ramp", at={"style": f"background:linear-gradient(to right,{stops})"})
    return join(
        [tag("figcaption", "MACs of every pixel, as a share of the full model's:"), bar, tag("div.ticks", *texts)]
    )


def _classes(f: Findings, colours: np.ndarray) -> Markup:
    entries = []
    for c, name in enumerate(f.class_names):
        style = f"background:{css(colours[c])};color:{ink(colours[c])}"
        entries.append(tag("li", tag("span.number", c + 1, at={"style": style}), tag("span", name)))
    return tag("ul.classes", *entries)


def _shares(f: Findings) -> Markup:
    rows = []
    for each in f.scene_shares:
        colour = css(ramp(101)[min(round(100 * each.spent), 100)])
        bar = tag("div.bar", tag("span", at={"style": f"width:{min(100 * each.spent, 100):.1f}%;background:{colour}"}))
        right = "" if each.right is None else f"{100 * each.right:.1f} %"
        cells = [each.name, f"{each.pixels:,}", f"{100 * each.spent:.1f} %", right]
        rows.append(tag("tr", *(tag("td", cell) for cell in cells), tag("td.wide", bar)))
    titles = ["pixels", "how many", "mean MACs, of full", "test pixels right", ""]
    head = tag("tr", *(tag("th", title, at={"scope": "col"}) for title in titles))
    return join([
        tag("h3", "Where in the scene the compute went"),
        tag("div.scroll", tag("table", tag("thead", head), tag("tbody", *rows))),
    ])  # fmt: skip
