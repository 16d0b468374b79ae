"""Tables, lists of facts and bars, the building blocks of the sections."""

from collections.abc import Mapping, Sequence

from dynanet.report.colours import css, ink, ramp
from dynanet.report.markup import Markup, join, tag

LEVELS = 101  # of the ramp of compute, one per percent of the full MACs


def table(titles: Sequence[str], rows: Sequence[Sequence[object]], caption: str, marked: int | None = None) -> Markup:
    """A table. On narrow screens, cells of the class `wide` get a line of their own, and the rest scrolls.

    Args:
        titles: of the columns.
        rows: cells, text or markup; markup may have a `td` of its own.
        caption: above the table.
        marked: the index of the highlighted row.
    """
    wide = any(isinstance(cell, Markup) and cell.startswith('<td class="wide"') for cell in rows[0])
    names = ["th"] * (len(titles) - wide) + ["th.wide"] * wide
    head = tag("tr", *(tag(name, title, at={"scope": "col"}) for name, title in zip(names, titles, strict=True)))
    body = []
    for i, row in enumerate(rows):
        cells = [cell if isinstance(cell, Markup) and cell.startswith("<td") else tag("td", cell) for cell in row]
        body.append(tag("tr.explained" if i == marked else "tr", *cells))
    columns = {"style": f"--columns:{len(titles) - 2}"} if wide else None
    whole = tag("table.folding" if wide else "table", tag("thead", head), tag("tbody", *body), at=columns)
    focus = {"tabindex": 0, "role": "group", "aria-label": caption}  # so that a keyboard can scroll it
    return join([tag("p.soft", caption), tag("div.scroll", whole, at=focus)])


def facts(entries: Mapping[str, object]) -> Markup:
    """A list of names and values; empty values are shown as not given."""
    return tag(
        "dl.facts", *(tag("div", tag("dt", name), tag("dd", said or "not given")) for name, said in entries.items())
    )


def compute_colour(share: float) -> tuple[str, str]:
    """The colour of a share of the full MACs, and the colour of text on it."""
    colour = ramp(LEVELS)[min(max(round((LEVELS - 1) * share), 0), LEVELS - 1)]
    return css(colour), ink(colour)


def swatch(colour: str, name: str) -> Markup:
    """An entry of a legend: a patch of colour and its name."""
    return tag("li", tag("span.swatch", at={"style": f"background:{colour}"}), name)


def colour_bar(ticks: Sequence[str], caption: str) -> Markup:
    """The scale of compute with evenly spaced ticks."""
    stops = ",".join(css(colour) for colour in ramp(9))
    step = 100 / (len(ticks) - 1)
    return join([
        tag("div.ramp", at={"style": f"background:linear-gradient(to right,{stops})"}),
        tag("div.ticks", *(tag("span", tick, at={"style": f"left:{i * step:.0f}%"}) for i, tick in enumerate(ticks))),
        tag("figcaption", caption),
    ])  # fmt: skip


def parts_bar(shares: Sequence[float], costs: Sequence[float], names: Sequence[str]) -> Markup:
    """A bar of parts that add up to 1, each in the colour of its cost, with its percentage where that fits."""
    drawn = []
    for share, cost, name in zip(shares, costs, names, strict=True):
        if share > 0:
            colour, text = compute_colour(cost)
            at = {
                "style": f"flex:{share:.4f} 1 0;background:{colour};color:{text}",
                "title": f"{name}: {100 * share:.1f} %",
            }
            drawn.append(tag("span", f"{100 * share:.0f}" if share >= 0.08 else "", at=at))
    return tag("div.bar", *drawn)


def length_bar(share: float) -> Markup:
    """A bar as long as a share of the full MACs, in its colour."""
    at = {"style": f"width:{min(100 * share, 100):.1f}%;background:{compute_colour(share)[0]}"}
    return tag("div.bar", tag("span", at=at))
