"""Write the measured results into README.md, docs/, results/README.md and the cards, from the rows in results/.

    python recipes/results.py            # rewrite
    python recipes/results.py --check    # exit 1 if a block differs from the rows

No figure there is typed by hand. A block lies between `<!-- results:NAME -->` and `<!-- end of results -->`.
"""

import sys

import numpy as np
from curve_tables import depths, points, short
from generation_tables import generation, generation_targets
from mechanism_tables import (
    break_even,
    choice,
    detection,
    encoders,
    exits,
    kernels,
    mechanism,
    recurrent,
    segmentation,
    sentences,
    several,
    speed_targets,
)
from rows import ROOT, percent, quiet, rows, source, spread, times
from sequence_tables import FRAMES, films, sequences

CARDS = ROOT / "dynanet" / "mechanisms" / "cards"
DOCS = ROOT / "docs"
END = "<!-- end of results -->"


def indian_pines():
    found = rows("indian_pines.csv")
    lines = [
        f"**Indian Pines**, fields cut so that train and test share no pixel; medians over {len(found)} splits, lowest and",
        "highest in brackets. MACs are those of a whole scene, as a share of the full model's.",
        source(found, "indian_pines.csv"),
        "",
        "| | test accuracy | MACs spent on test pixels |",
        "|---|---|---|",
        f"| full model | {spread(found, 'full', percent)} | 100 % |",
    ]
    for share in ("50", "25"):
        accuracy, macs = spread(found, f"at_{share}", percent), spread(found, f"macs_{share}", percent)
        lines.append(f"| budget of {share} % | {accuracy} | {macs} |")
        lines.append(f"| random exits at the same rates | {spread(found, f'random_{share}', percent)} | as above |")
    for share in ("100", "50", "25"):
        static = [row for row in rows("indian_pines_static.csv") if row["share"] == share]
        if static:
            spent = percent(float(static[0]["macs_share"]))
            lines.append(f"| static network, same recipe, one exit | {spread(static, 'accuracy', percent)} | {spent} |")
    lines.append(f"| RBF SVM on single spectra | {spread(found, 'svm', percent)} | |")
    lines += [
        "",
        "The whole scene, against the full model run the same way, one thread:",
        "",
        "| | times faster | MACs |",
    ]
    lines += ["|---|---|---|"]
    for share in ("50%", "25%"):
        speed, macs = spread(found, f"scene_times_{share}", times), spread(found, f"scene_macs_{share}", percent)
        lines.append(f"| budget of {share.replace('%', ' %')} | {speed} | {macs} |")
    return lines


def msdnet():
    found = quiet([row for row in rows("msdnet_speed.csv") if row["threads"] == "1"])
    repeats = max((sum(row["batch"] == b for row in found) for b in {row["batch"] for row in found}), default=0)
    lines = [
        f"**MSDNet**, the authors' CIFAR network with geometric exits: a session against the same weights; medians over "
        f"{repeats} processes on a quiet machine, one thread.",
        source(found, "msdnet_speed.csv"),
        "",
        "| batch | times faster than eager, all exits computed | than the same engine, nothing skipped | than the best "
        "dense engine | realised speed-up (fraction of the MAC saving) | scheduling efficiency | scheduling efficiency of the stream |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = ("over_reference", "over_same_engine", "over_best_dense", "over_flop_ratio", "over_latency_theory",
               "stream_over_latency_theory")  # fmt: skip
    for batch in sorted({int(row["batch"]) for row in found}):
        mine = [row for row in found if int(row["batch"]) == batch]
        lines.append(f"| {batch} | " + " | ".join(spread(mine, column, times) for column in columns) + " |")
    return lines


def cifar10(*networks):
    points, speeds = rows("cifar10_frontier.csv"), rows("cifar10_speed.csv")
    what = "a cascade of two static networks" if networks == ("cascade",) else (
        "a staged ResNet and MSDNet, five exits each, and a cascade of two static networks"
    )  # fmt: skip
    lines = [
        f"**CIFAR-10**, {what}, against static ones by the same recipe "
        f"({' or '.join(sorted({row['epochs'] for row in points}))} epochs). The budget is the cheapest whose held-out accuracy reaches "
        "the static network's; one thread, each in its best engine.",
        source(points, "cifar10_frontier.csv"),
        "",
        "| with exits | static network | its test accuracy | its MACs | early exit's test accuracy | its MACs | times the "
        "images per second, batch 1 | batch 64 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in dict.fromkeys((r["network"], r["static"]) for r in speeds if not networks or r["network"] in networks):
        mine = {row["batch"]: row for row in speeds if (row["network"], row["static"]) == pair}
        any_ = next(iter(mine.values()))
        lines.append(f"| {pair[0]} | {pair[1]} ")
        if any_.get("note"):
            lines[-1] += f"| {percent(float(any_['static_accuracy']))} | | {any_['note']} | | | |"
            continue
        lines[-1] += (
            f"| {percent(float(any_['static_accuracy']))} | {float(any_['static_macs']) / 1e6:.1f} M | "
            f"{percent(float(any_['accuracy']))} | {float(any_['macs']) / 1e6:.1f} M | "
            f"{times(float(mine['1']['times']))} | {times(float(mine['64']['times']))} |"
        )
    return lines


def scene():
    found = rows("indian_pines.csv")
    lines = [
        f"A whole hyperspectral scene (Indian Pines, 145 x 145 pixels), one thread, against the full model run the same "
        f"way; medians over {len(found)} splits, lowest and highest in brackets.",
        source(found, "indian_pines.csv"),
        "",
        "| | times faster | MACs |",
        "|---|---|---|",
    ]
    for share in ("50%", "25%"):
        speed, macs = spread(found, f"scene_times_{share}", times), spread(found, f"scene_macs_{share}", percent)
        lines.append(f"| budget of {share.replace('%', ' %')} | {speed} | {macs} |")
    return lines


def targets():
    """Targets set before anything was measured, and the medians reached."""
    lines = ["| what | target | reached | |", "|---|---|---|---|"]

    def line(what, target, values, form=times, below=False):
        if not values:
            lines.append(f"| {what} | {'at most' if below else 'at least'} {form(target)} | not measured | |")
            return
        value = float(np.median(values))
        met = value <= target if below else value >= target
        word = "at most" if below else "at least"
        lines.append(f"| {what} | {word} {form(target)} | {form(value)} | {'met' if met else '**missed**'} |")

    speeds = quiet(rows("msdnet_speed.csv"))

    def cells(column, batch, threads="1"):
        return [float(r[column]) for r in speeds if r["batch"] == str(batch) and r["threads"] == threads]

    for batch, target in ((1, 10), (8, 6), (64, 4.5)):
        line(f"MSDNet session over eager with all exits, batch {batch}", target, cells("over_reference", batch))
    for batch, target in ((1, 0.95), (8, 0.85), (64, 0.95)):
        line(f"MSDNet, scheduling efficiency, batch {batch}", target, cells("over_latency_theory", batch))
    line("the same, refilled batches (stream), batch 8", 0.95, cells("stream_over_latency_theory", 8))
    line("MSDNet, scheduling efficiency, batch 64, all threads", 0.9, cells("over_latency_theory", 64, "2"))
    pines = rows("indian_pines.csv")

    def column(get):
        return [get({k: float(v) for k, v in row.items() if k in NUMBERS and v}) for row in pines]

    points = lambda value: f"{100 * value:.1f} points"  # noqa: E731
    line("Indian Pines, full model", 0.80, column(lambda r: r["full"]), percent)
    line("its lead over an RBF SVM", 0.02, column(lambda r: r["full"] - r["svm"]), points)
    line("lost at 50 % of the MACs", 0.005, column(lambda r: r["full"] - r["at_50"]), points, below=True)
    line("lost at 25 % of the MACs", 0.03, column(lambda r: r["full"] - r["at_25"]), points, below=True)
    line("its lead over random exits at 50 %", 0.04, column(lambda r: r["at_50"] - r["random_50"]), points)
    for share in (50, 25):
        off = column(lambda r, s=share: abs(r[f"macs_{s}"] / (s / 100) - 1))
        line(f"realised MACs, deviation from the budget of {share} %", 0.05, off, percent, below=True)
    for share, target in (("50%", 1.6), ("25%", 2.5)):
        line(f"scene, times faster at {share}", target, column(lambda r, s=share: r[f"scene_times_{s}"]))
    for row in rows("cifar10_speed.csv"):
        if row.get("times"):
            what = f"CIFAR-10, {row['network']} over {row['static']} at its held-out accuracy, batch {row['batch']}"
            line(what, 1.3, [float(row["times"])])
    for what, target, values in (*speed_targets(), *generation_targets()):
        line(what, target, values)
    return lines


NUMBERS = {
    *("svm", "full", "at_50", "at_25", "random_50", "macs_50", "macs_25"),
    *("scene_times_50%", "scene_times_25%"),
}


def headlines():
    """The three figures of the README, and the case in which a smaller static network is faster."""
    alone = [row for row in quiet(rows("msdnet_speed.csv")) if (row["threads"], row["batch"]) == ("1", "1")]
    pines = rows("indian_pines.csv")
    text = [r for r in quiet(rows("text_exits_speed.csv")) if r["data"].startswith("SST-2") and r["batch"] == "1"]
    small = next(
        row
        for row in rows("cifar10_speed.csv")
        if (row["network"], row["static"], row["batch"]) == ("staged", "static-0.5", "1")
    )

    def median(found, column):
        return float(np.median([float(row[column]) for row in found]))

    lost = 100 * (float(text[-1]["whole_accuracy"]) - float(text[-1]["accuracy"]))
    return [
        f"- **{median(alone, 'over_reference'):.1f} times faster than eager PyTorch**, and {median(alone, 'over_best_dense'):.2f} "
        f"times faster than the best engine without early exits: MSDNet at batch 1 and {percent(1 / median(alone, 'macs_ratio'))} of "
        "its MACs, random weights ([rows](results/msdnet_speed.csv)).",
        f"- **{median(pines, 'scene_times_50%'):.2f} and {median(pines, 'scene_times_25%'):.2f} times faster** at budgets of 50 % and "
        f"25 % of the MACs: a whole hyperspectral scene, median of {len(pines)} splits ([rows](results/indian_pines.csv)).",
        f"- **{median(text, 'over_best_static'):.1f} times the sentences per second** for {lost:.1f} points of accuracy: "
        "MiniLM on SST-2, one sentence at a time ([rows](results/text_exits_speed.csv)).",
        "",
        f"Where it does not pay: on CIFAR-10 at batch 1 a smaller static network ({percent(float(small['static_accuracy']))} "
        f"accuracy) is {1 / float(small['times']):.1f} times faster than early exit ({percent(float(small['accuracy']))}; "
        "[rows](results/cifar10_speed.csv)). See [when nothing pays](docs/trust.md#when-nothing-pays).",
    ]


def to_choose():
    """The table of mechanisms in docs/choosing.md: its first three cells are kept, the others come from the rows."""
    text = (DOCS / "choosing.md").read_text().split("<!-- results:choice -->")[1].split(END)[0]
    lines = [
        "| your inputs | mechanism | what is decided | accuracy against a static network of the same MACs, points | gain "
        "over random gates, points | realised speed-up (fraction of the MAC saving), batch 1 / 8 / 64 / 256: larger networks, "
        "random weights | the trained networks |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in text.strip().split("\n")[2:]:
        cells = [cell.strip() for cell in line.split("|")[1:4]]
        card = cells[1].split("cards/")[1].split(".md")[0]
        worth = choice(card) or ("not measured yet", "", "", "")
        lines.append(f"| {' | '.join([*cells, *worth])} |".replace("|  |", "| |"))
    return lines


def blocks():
    """Every block: the file it is in, its name, its lines."""
    yield ROOT / "README.md", "headlines", headlines()
    yield DOCS / "choosing.md", "choice", to_choose()
    yield DOCS / "results.md", "measured", ["", *indian_pines(), "", *msdnet(), "", *cifar10(), "", *encoders(), ""]
    yield ROOT / "results" / "README.md", "targets", targets()
    yield ROOT / "results" / "README.md", "parameters", mechanism("parameters")
    mine = {
        "early_exit": several([*msdnet(), "", *cifar10()], short(), exits(), sentences(), generation()),
        "neuron_skip": several(mechanism("neuron_skip"), kernels("neuron_skip")),
        "experts": several(mechanism("experts"), kernels("experts")),
        "spatial_skip": several(mechanism("spatial_skip"), kernels("spatial_skip"), break_even()),
        "pixel_cascade": segmentation(),
        "cascade": cifar10("cascade"),
        "scene_exit": scene(),
        "layer_skip": several(mechanism("layer_skip"), detection("skip-0.65", "skip-rates-0.5")),
        "position_halting": detection("halting-0.05", "halting-0.02"),
        **{card: several(sequences(card), recurrent(card)) for card in ("update_skip", "skim")},
        **{card: sequences(card) for card in ("early_stop", "jump")},
        **{card: films(card) for card in FRAMES},
        "point_refine": points(),
        "mixture_of_depths": depths(),
    }
    for card in sorted(CARDS.glob("*.md")):
        yield card, card.stem, mine[card.stem] if card.stem in mine else mechanism(card.stem)


def main():
    stale = []
    for path, name, lines in blocks():
        text, begin = path.read_text(), f"<!-- results:{name} -->"
        before, rest = text.split(begin)
        where = {CARDS: "../../../results/", DOCS: "../results/", ROOT: "results/", ROOT / "results": ""}[path.parent]
        lines = [line.replace("](results/", f"]({where}") for line in lines]
        new = "\n".join([f"{before}{begin}", *lines, f"{END}{rest.split(END, 1)[1]}"])
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(new)
    if stale and "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)}: not what results/ says; run python recipes/results.py")


if __name__ == "__main__":
    main()
