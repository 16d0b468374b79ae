"""Write the measured results into README.md, from the rows in results/: no figure there is typed by hand.

python recipes/readme_results.py            # rewrite
python recipes/readme_results.py --check    # exit 1 if README.md does not say what the rows say
"""

import csv
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: written by recipes/readme_results.py -->", "<!-- end of results -->"


def rows(name):
    path = ROOT / "results" / name
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def spread(found, column, form):
    """The median, and in brackets the lowest and the highest."""
    values = [float(row[column]) for row in found if row.get(column)]
    if not values:
        return "not measured"
    return f"{form(np.median(values))} ({form(min(values))} to {form(max(values))})"


def percent(value):
    return f"{100 * value:.1f} %"


def times(value):
    return f"{value:.2f}"


def source(found, name):
    """Where rows come from: file, device, load, versions, commits."""
    if not found:
        return ""
    loads = [float(row["load"]) for row in found]
    commits = sorted({row["commit"] for row in found})
    return (
        f"[{name}](results/{name}): {found[0]['device']}, load average {min(loads):.1f} to {max(loads):.1f}, torch "
        f"{found[0]['torch']}, ONNX Runtime {found[0]['onnxruntime']}, commit {', '.join(commits)}."
    )


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
    lines.append(f"| static network, same layers and recipe, one exit | {spread(found, 'static', percent)} | 100 % |")
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
    found = [row for row in rows("msdnet_speed.csv") if row["threads"] == "1"]
    repeats = max((sum(row["batch"] == b for row in found) for b in {row["batch"] for row in found}), default=0)
    lines = [
        f"**MSDNet**, the authors' CIFAR network with geometric exits: a session against the same weights; medians over "
        f"{repeats} processes, one thread.",
        source(found, "msdnet_speed.csv"),
        "",
        "| batch | times faster than eager, all exits computed | than the same engine, nothing skipped | than the best "
        "dense engine | of the FLOP ratio | of the latency theory | the stream, of the latency theory |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = ("over_reference", "over_same_engine", "over_best_dense", "over_flop_ratio", "over_latency_theory",
               "stream_over_latency_theory")  # fmt: skip
    for batch in sorted({int(row["batch"]) for row in found}):
        mine = [row for row in found if int(row["batch"]) == batch]
        lines.append(f"| {batch} | " + " | ".join(spread(mine, column, times) for column in columns) + " |")
    return lines


def cifar10():
    points, speeds = rows("cifar10_frontier.csv"), rows("cifar10_speed.csv")
    lines = [
        "**CIFAR-10**, a staged ResNet and MSDNet, five exits each, against static networks by the same recipe "
        f"({' or '.join(sorted({row['epochs'] for row in points}))} epochs). The budget is the cheapest whose held-out accuracy reaches "
        "the static network's; one thread, each in its best engine.",
        source(points, "cifar10_frontier.csv"),
        "",
        "| with exits | static network | its test accuracy | its MACs | early exit's test accuracy | its MACs | times the "
        "images per second, batch 1 | batch 64 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in dict.fromkeys((row["network"], row["static"]) for row in speeds):
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


def main():
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    tables = "\n".join(["", *indian_pines(), "", *msdnet(), "", *cifar10(), ""])
    new = f"{before}{BEGIN}\n{tables}\n{END}{after}"
    if "--check" in sys.argv:
        sys.exit(
            0 if new == text else "README.md does not say what results/ says; run python recipes/readme_results.py"
        )
    readme.write_text(new)


if __name__ == "__main__":
    main()
