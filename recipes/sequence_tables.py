"""Tables about what skips, skims or stops in time: rows of `sequences.py`."""

import numpy as np
from rows import percent, rows, source

NAMES = {  # card: the first words of its networks
    "update_skip": ("update_skip",),
    "skim": ("skim", "skim_hard"),
    "early_stop": ("early_stop", "earliest"),
}
OTHER = {"early_stop": "fixed"}  # the second policy that sees nothing; else `trained_random`


def found(card):
    """Every row about a card."""
    return [
        row
        for row in rows("sequences.csv")
        if row["network"].split()[0] in NAMES.get(card, ()) and not row["network"].endswith("by lot")
    ]


def worth(card):
    """Points over static and over random gates."""
    return [
        tuple(float(row["accuracy"]) - float(row[f"{other}_accuracy"]) for other in ("static", "random"))
        for row in found(card)
        if row["static_accuracy"] and row["random_accuracy"]
    ]


def sequences(card):
    """The block of a card."""
    mine = found(card)
    if not mine:
        return ["Not measured yet: no row in `results/`."]
    stops = card == "early_stop"
    blind = "all stop at the same frame" if stops else "random updates, trained so"
    lines = [
        "Recurrent networks (GRU) on sequences of different lengths, all of a set by the same recipe; accuracies on test "
        "sequences. Beside each, at the same MACs (interpolated): a smaller GRU; the full GRU that reads every second or fourth "
        + (
            "frame. Random: stops by lot, with the network's own odds at each decision. Thresholds are from held-out sequences."
            if stops
            else "frame; the full GRU with random updates in training too. Random: this network, its updates drawn at its own rate."
        ),
        source(mine, "sequences.csv"),
        "",
        f"| set | network | epochs | accuracy | MACs | frames {'heard' if stops else 'read'} | static, same MACs | every n-th "
        f"frame | full network | its MACs | random | {blind} |" + " itself, to the end |" * stops,
        "|---|---|---|---|---|---|---|---|---|---|---|---|" + "---|" * stops,
    ]  # fmt: skip
    for key in dict.fromkeys((row["data"], row["network"], row["setting"]) for row in mine):
        cell = [row for row in mine if (row["data"], row["network"], row["setting"]) == key]
        lines.append(f"| {' | '.join(_cells(card, key, cell))} |")
    return [*lines, "", *_where(mine, stops)]


def _cells(card, key, cell):
    data, network, setting = key
    yield f"{data} ({cell[0]['test_sequences']})"
    yield ", ".join(
        filter(None, [network, setting, "cannot be promised" if "cannot be promised" in cell[0]["note"] else ""])
    )
    yield cell[0]["epochs"]
    yield _share(cell, "accuracy")
    yield _macs(_median(cell, "macs"))
    heard = f"{_median(cell, 'frames_read'):.1f} of {_median(cell, 'frames'):.1f}"
    yield heard + (
        f", {_median(cell, 'seconds_heard'):.2f} of {_median(cell, 'seconds'):.2f} s" if _timed(card, cell) else ""
    )
    yield _share(cell, "static_accuracy")
    yield _share(cell, "rarer_accuracy")
    yield _share(cell, "full_accuracy")
    yield _macs(_median(cell, "full_macs"))
    yield _share(cell, "random_accuracy")
    yield _share(cell, f"{OTHER.get(card, 'trained_random')}_accuracy")
    if card in OTHER:
        yield _share(cell, "end_accuracy")


def _timed(card, cell):
    return card in OTHER and cell[0]["seconds_heard"]


def _where(mine, stops):
    seeds = len({row["seed"] for row in mine})
    lines = [
        f"In brackets: test sequences. {'One training each' if seeds == 1 else f'Medians over up to {seeds} trainings'}: differences of one or two "
        "standard errors (a point with 300 sequences, five with 40) say little. An empty cell: fewer MACs than the cheapest of "
        "those, or more than the dearest.",
    ]
    if not stops:
        lines.append("The answer comes at the end of a sequence: skipping saves MACs, and no time until the answer.")
    return lines


def _median(cell, column):
    values = [float(row[column]) for row in cell if row[column]]
    return float(np.median(values)) if values else None


def _share(cell, column):
    value = _median(cell, column)
    return "" if value is None else percent(value)


def _macs(value):
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.0f} k"
