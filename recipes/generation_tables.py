"""The table about generation with exits: rows of `shakespeare.py`."""

import numpy as np
from mechanism_tables import NOTHING
from rows import percent, quiet, rows, source, times


def generation():
    """The block: every way to generate beside the whole model, and bits per letter of every exit."""
    found = quiet(rows("shakespeare.csv"))
    if not found:
        return NOTHING
    exits = [row for row in found if row["bits"]]
    one = found[0]
    bits = [f"{_median(exits, way, None, 'bits'):.2f}" for way in dict.fromkeys(row["way"] for row in exits)]
    lines = [
        f"Generation: tiny Shakespeare letter by letter, 8 layers of {one['width']} features, trained for {one['steps']} "
        "steps; bits per letter of the exits on test text, first to last: "
        f"{', '.join(bits)}. "
        "Beside the whole model generating greedily with a cache, one thread, medians. Thresholds are those that "
        f"Learn-then-Test promises on validation prompts, at a risk of {percent(float(one['risk']))} of letters that "
        "differ with a confidence of 90 %; ways that cannot be promised are not here. Drafts give the whole model's text "
        "letter for letter, which was checked before anything was timed.",
        source(found, "shakespeare.csv"),
        "",
        "| way | batch | letters per second | times the whole model | MACs, whole model over this | letters equal to the "
        "whole model's | mean exit | drafted letters accepted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, batch in dict.fromkeys((row["way"], row["batch"]) for row in found if not row["bits"]):
        shown = [
            ("letters_per_s", lambda value: f"{value:.0f}"), ("times", times), ("macs_ratio", times),
            ("same_letters", percent), ("mean_exit", times), ("accepted", percent),
        ]  # fmt: skip
        cells = [(_median(found, way, batch, column), form) for column, form in shown]
        lines.append(f"| {way} | {batch} | {' | '.join('' if v is None else form(v) for v, form in cells)} |")
    return lines


def generation_targets():
    """(what, target, values) of the speeds that a target was set for: every draft, not the best."""
    found = [row for row in quiet(rows("shakespeare.csv")) if row["way"].startswith("drafts")]
    for way, batch in dict.fromkeys((row["way"], row["batch"]) for row in found) or [("drafts", "1")]:
        values = [float(row["times"]) for row in found if (row["way"], row["batch"]) == (way, batch)]
        yield f"self-speculation, letters per second over the whole model, {way}, batch {batch}", 1.3, values


def _median(found, way, batch, column):
    values = [float(r[column]) for r in found if r["way"] == way and batch in (None, r["batch"]) and r[column]]
    return float(np.median(values)) if values else None
