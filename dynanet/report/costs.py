"""Charts of accuracy against MACs and milliseconds, with random exits, single exits and static networks."""

from collections.abc import Callable
from typing import NamedTuple

from dynanet.calibrate.budgeted import Outcome
from dynanet.report.charts import Axis, Series, scatter
from dynanet.report.evaluation import Evaluation
from dynanet.report.findings import Findings
from dynanet.report.markup import Markup, join, tag
from dynanet.report.words import quantity

UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class Spot(NamedTuple):
    """A point of both charts: costs (None: not known), accuracy and a label."""

    macs: float | None
    ms: float | None
    accuracy: float
    label: str = ""


def cost_section(f: Findings) -> Markup:
    """Accuracy against MACs, and against milliseconds where they are known."""
    unit = quantity(f.full.macs).partition(" ")[2]
    named = {"": "", "k": ", thousands", "M": ", millions", "G": ", billions", "T": ", trillions"}[unit]
    note = "The vertical axis need not begin at zero."
    untimed = " Time was not measured." if not f.how_timed else ""
    figures = [
        tag(
            "figure",
            tag("h3", "Accuracy against MACs"),
            _chart(f, lambda spot: None if spot.macs is None else spot.macs / UNITS[unit], f"MACs per sample{named}"),
            tag("figcaption", note + untimed),
        )
    ]
    if f.how_timed:
        chart = _chart(f, lambda spot: spot.ms, "milliseconds per sample")
        lines = f.timing is not None and any(each.ms is not None for each in f.line)
        said = f"{note} {f.how_timed}" + " The lines are sums of the measured times of the exits." * lines
        figures.append(tag("figure", tag("h3", "Accuracy against time"), chart, tag("figcaption", said)))
    said = "Up and to the left is better. Costs are means over the test samples."
    if f.line:
        said += " The solid line (early exit) should lie above the dashed one (random exits at the same rates)."
    return join([tag("h2", "Accuracy against cost"), tag("p", said), tag("div.pair", *figures)])


def _chart(f: Findings, cost: Callable[[Spot], float | None], title: str) -> Markup:
    plain = [each for each in f.evaluations if not each.risky]
    risky = [each for each in f.evaluations if each.risky]
    groups = [
        ("random exits", "random", "", [_spot(each) for each in f.random]),
        ("early exit", "frontier", "", [_spot(each) for each in f.line]),
        ("single exit", "alone", "diamond", [_spot(p, f"exit {k + 1}") for k, p in enumerate(f.alone)]),
        ("static networks", "static", "square", [Spot(p.macs, p.ms, p.accuracy, p.name) for p in f.static]),
        ("full model", "full", "square", [Spot(f.full.macs, f.full_ms, f.full.accuracy, "full")]),
        ("operating points", "budget", "circle", [_point(each) for each in plain]),
        ("operating points with a risk", "promised", "triangle", [_point(each) for each in risky]),
    ]
    series = []
    for name, look, mark, spots in groups:
        known = [(x, spot) for spot in spots if (x := cost(spot)) is not None]
        if not mark:
            known.sort(key=lambda each: each[0])  # on test samples a higher budget can cost less
        places = [(x, 100 * spot.accuracy) for x, spot in known]
        labels = [spot.label for _, spot in known]
        series.append(Series(name, look, places, mark, line=not mark, labels=labels))
    costs = [x for each in series for x, _ in each.points]
    log = 0 < 20 * min(costs) < max(costs)
    across = Axis(title + (", logarithmic" if log else ""), log, zero=not log)
    described = f"Chart of accuracy against {title}; the tables of operating points and of exits have its figures."
    return scatter(across, Axis("accuracy, %", most=100.5), series, described)


def _spot(outcome: Outcome, label: str = "") -> Spot:
    return Spot(outcome.macs, outcome.ms, outcome.accuracy, label)


def _point(each: Evaluation) -> Spot:
    return Spot(each.outcome.macs, each.ms, each.outcome.accuracy, each.name)
