"""Tables, lists of facts and bars: what the sections of the page are made of."""

from collections.abc import Mapping, Sequence

from dynanet.report.colours import css, ink, ramp
from dynanet.report.markup import Markup, join, tag

LEVELS = 101  # of the ramp of compute, one per percent of the full MACs


def table(titles: Sequence[str], rows: Sequence[Sequence[object]], caption: str, marked: int | None = None) -> Markup:
    """A table. Where the screen is narrow, cells of the class `wide` get a line of their own, and the rest scrolls.

    Args:
        titles: of the columns.
        rows: cells, text or markup; a cell may bring its own `td`.
        caption: above the table.
        marked: the row that stands out.
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
    reach = {"tabindex": 0, "role": "group", "aria-label": caption}  # a keyboard scrolls it too
    return join([tag("p.soft", caption), tag("div.scroll", whole, at=reach)])


def facts(entries: Mapping[str, object]) -> Markup:
    """Names and what is known of them; what is empty is not given."""
    return tag(
        "dl.facts", *(tag("div", tag("dt", name), tag("dd", said or "not given")) for name, said in entries.items())
    )


def compute_colour(share: float) -> tuple[str, str]:
    """The colour of a share of the full MACs, and that of text on it."""
    colour = ramp(LEVELS)[min(max(round((LEVELS - 1) * share), 0), LEVELS - 1)]
    return css(colour), ink(colour)


def parts_bar(shares: Sequence[float], costs: Sequence[float], names: Sequence[str]) -> Markup:
    """A bar of parts that add up to 1, each in the colour of its cost and with its percentage where that fits."""
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
