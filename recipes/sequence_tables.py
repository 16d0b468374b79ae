"""Tables about what skips, skims, jumps, stops or selects in time: rows of `sequences.py` and `frames.py`."""

import numpy as np
from rows import percent, plain, rows, source

NAMES = {  # card: the first words of its networks
    "update_skip": ("update_skip",),
    "skim": ("skim", "skim_hard"),
    "early_stop": ("early_stop", "earliest"),
    "jump": ("jump",),
}
FRAMES = {  # card: its networks in `frames.py`, and the fixed policy beside them
    "frame_select": (("frame_select", "frame_select_hard"), "every picture at one size, trained so"),
    "frame_exit": (("frame_exit",), "all stop after the same number"),
    "clip_sampling": (("clip_sampling", "clip_sampling_whole"), "as many, evenly spaced"),
}
OTHER = {"early_stop": "fixed"}  # the second input-independent policy; else `trained_random`
COUNTED = {"early_stop": "read", "jump": "read; elapsed until the last of them"}


def found(card):
    """Every row about a card."""
    if card in FRAMES:
        return [row for row in rows("frames.csv") if row["network"].split()[0] in FRAMES[card][0]]
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
    what = "jumps" if card == "jump" else "updates"
    blind = "all stop at the same frame" if stops else f"random {what}, trained so"
    own = "jumps drawn as often as its own" if card == "jump" else "updates drawn at its own rate"
    lines = [
        "Recurrent networks (GRU) on sequences of different lengths, all of a set by the same recipe; accuracies on test "
        "sequences. Beside each, at the same MACs (interpolated): a smaller GRU; the full GRU that reads every second or fourth "
        + (
            "frame. Random: stops drawn with the network's own rate at each decision. Thresholds are from held-out sequences."
            if stops
            else f"frame; the full GRU with random {what} in training too. Random: this network, its {own}."
        ),
        source(mine, "sequences.csv"),
        "",
        f"| set | network | epochs | accuracy | MACs | frames {COUNTED.get(card, 'read')} | static, same MACs | every n-th "
        f"frame | full network | its MACs | random | {blind} |" + " itself, to the end |" * stops,
        "|---|---|---|---|---|---|---|---|---|---|---|---|" + "---|" * stops,
    ]  # fmt: skip
    for key in dict.fromkeys((row["data"], row["network"], row["setting"]) for row in mine):
        cell = [row for row in mine if (row["data"], row["network"], row["setting"]) == key]
        lines.append(f"| {' | '.join(_cells(card, key, cell))} |")
    if card == "jump":
        lines += ["", "jump R-K-N: R frames read between jumps of at most K, of which there are at most N."]
    return [*lines, "", *_where(card, mine)]


def films(card):
    """The block of a card about pictures: rows of `frames.py`."""
    mine = found(card)
    if not mine:
        return ["Not measured yet: no row in `results/`."]
    own, select = card == "frame_exit", card == "frame_select"
    lines = [
        "Spoken digits as films of spectrogram pictures (no video): a picture is 40 mel bands x 0.1 s, the next one begins 0.05 s "
        "later. All by the same recipe; accuracies on "
        f"{mine[0]['test_films']} test recordings. Beside each, at the same MACs (interpolated): a narrower encoder that sees "
        "every picture; the full encoder on 1, 2 or 4 evenly spaced pictures, trained so. Random: "
        + {
            "frame_exit": "exits drawn with the network's own rate after each picture. Thresholds are from held-out recordings.",
            "frame_select": "this network, sizes and skips drawn as often as its own.",
            "clip_sampling": "as many pictures, chosen at random; no scorer is needed for these, but its MACs are counted.",
        }[card],
        source(mine, "frames.csv"),
        "",
        "| network | epochs | accuracy | MACs | pictures seen | sound in them | static, same MACs | fewer pictures, trained so | full "
        f"network | its MACs | random | {FRAMES[card][1]} | itself, all pictures{' as they are' * select} |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for key in dict.fromkeys((row["network"], row.get("setting", "")) for row in mine):
        cell = [row for row in mine if (row["network"], row.get("setting", "")) == key]
        lines.append(f"| {' | '.join(_film_cells(key, cell))} |")
    if own:
        lines += ["", "frame_exit with the beta of `ExitLabels`; at most 10 pictures are read, from coarse to fine."]
    return [*lines, "", *_films_where(mine)]


def _film_cells(key, cell):
    noted = any("cannot be promised" in (row["note"] or "") for row in cell)
    yield ", ".join(filter(None, [*map(plain, key), "cannot be promised" if noted else ""]))
    yield cell[0]["epochs"]
    yield _share(cell, "accuracy")
    yield _macs(_median(cell, "macs"))
    yield f"{_median(cell, 'frames_seen'):.1f} of {_median(cell, 'frames'):.1f}"
    yield f"{_median(cell, 'seconds_seen'):.2f} of {_median(cell, 'seconds'):.2f} s"
    yield _share(cell, "static_accuracy")
    yield _share(cell, "rarer_accuracy")
    yield _share(cell, "full_accuracy")
    yield _macs(_median(cell, "full_macs"))
    for other in ("random", "fixed", "end"):
        yield _share(cell, f"{other}_accuracy")


def _films_where(mine):
    seeds = len({row["seed"] for row in mine})
    return [
        f"{'One training each' if seeds == 1 else f'Medians over {seeds} trainings'}: differences of one or two points say "
        "little. An empty cell: fewer MACs than the cheapest of those, or more than the most expensive. The answer comes at the end of "
        "a recording: what is saved is MACs, not time until the answer.",
    ]  # fmt: skip


def _cells(card, key, cell):
    data, network, setting = key
    yield f"{data} ({cell[0]['test_sequences']})"
    yield ", ".join(
        filter(None, [network, plain(setting), "cannot be promised" if "cannot be promised" in cell[0]["note"] else ""])
    )
    yield cell[0]["epochs"]
    yield _share(cell, "accuracy")
    yield _macs(_median(cell, "macs"))
    read = f"{_median(cell, 'frames_read'):.1f} of {_median(cell, 'frames'):.1f}"
    if card == "jump":
        read += f"; {_median(cell, 'frames_heard'):.1f}"
    yield read + (
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
    return card in COUNTED and cell[0]["seconds_heard"]


def _where(card, mine):
    seeds = len({row["seed"] for row in mine})
    lines = [
        f"In brackets: test sequences. {'One training each' if seeds == 1 else f'Medians over up to {seeds} trainings'}: differences of one or two "
        "standard errors (a point with 300 sequences, five with 40) say little. Frames of texts are words or parts of them. An "
        "empty cell: fewer MACs than the cheapest of "
        "those, or more than the most expensive.",
    ]
    if card not in COUNTED:
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
