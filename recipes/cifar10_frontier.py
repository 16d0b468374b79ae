"""CIFAR-10: the trained network with exits at many budgets, beside the static networks of the same recipe.

    python recipes/cifar10_frontier.py --data DIR --runs runs/cifar10 --results results

Thresholds are fitted on the 5,000 held-out images. For every static network the cheapest budget is taken whose
*held-out* accuracy reaches the static one's; then both are timed in one process, each in its best engine, on the test
images in their own order. All cells are written, whatever they say.
"""

import argparse
import csv
import io
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from dynanet import Budget, CostModel, zoo
from dynanet.bench.compare import check_equivalent, dense_engines
from dynanet.bench.machine import facts
from dynanet.bench.paired import paired, ratio
from dynanet.core.files import write_atomically
from dynanet.core.macs import CountMacs
from dynanet.data.augment import channel_stats, normalise
from dynanet.data.parquet import load_parquet
from dynanet.data.splits import hold_out
from dynanet.infer import Session, anytime, at_random, calibrate, outcome, tabulate

WIDTHS = {"static-0.5": 0.5, "static-0.7": 0.7, "static-1.0": 1.0}


def static_right(model, x, y):
    with torch.no_grad():
        return float(
            np.mean([(model(b).argmax(1) == t).float().mean() for b, t in zip(x.split(500), y.split(500), strict=True)])
        )


def each(run, groups):
    for group in groups:
        run(group)


def write(path, rows):
    text, names = io.StringIO(), list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)

    train, held_out = hold_out(load_parquet(args.data, "train").to_memory(), 5000, seed=0)
    test = load_parquet(args.data, "test").to_memory()
    mean, std = channel_stats(train.images)
    x, y = normalise(test.images, mean, std), test.labels
    held = (normalise(held_out.images, mean, std), held_out.labels)
    batches = DataLoader(TensorDataset(*held), 250)

    saved = torch.load(args.runs / "staged" / "state.pt", weights_only=True)
    model = zoo.staged_resnet(num_classes=10, depths=(1, 2, 2), context=64)
    model.load_state_dict(saved["model"])
    model.eval()
    about = {"data": "CIFAR-10 (JPEG re-encoding), test", "epochs": saved["epoch"], "seed": 0, **facts()}
    cost = CostModel(model, x[:1])
    frontier = calibrate(model, batches, cost)
    table = tabulate(model, DataLoader(TensorDataset(x, y), 250), cost)

    rows = []
    for k, point in enumerate(anytime(table)):
        rows.append({"network": f"staged, all at exit {k + 1}", "macs": point.macs, "accuracy": point.accuracy})
    for choice in frontier.curve(20):
        reached = outcome(table, choice.thresholds)
        rows.append({
            "network": "staged, early exit", "asked_macs": choice.asked.macs, "macs": reached.macs,
            "accuracy": reached.accuracy, "held_out_accuracy": choice.accuracy,
            "random_exits_accuracy": at_random(table, reached.share).accuracy,
            "shares": " ".join(f"{s:.3f}" for s in reached.share),
        })  # fmt: skip
    speeds = []
    for name, width in WIDTHS.items():
        state = args.runs / name / "state.pt"
        if not state.exists():
            continue
        static = zoo.static_resnet(num_classes=10, depths=(1, 2, 2), width_multiplier=width)
        static.load_state_dict(torch.load(state, weights_only=True)["model"])
        static.eval()
        with CountMacs() as count, torch.no_grad():
            static(x[:1])
        known, right = static_right(static, *held), static_right(static, x, y)
        rows.append({"network": name, "macs": count.total, "accuracy": right, "held_out_accuracy": known})
        enough = [choice for choice in frontier.curve(60) if choice.accuracy >= known]
        if not enough:
            speeds.append({"static": name, "static_accuracy": right, "note": "no budget reaches its held-out accuracy"})
            continue
        choice = min(enough, key=lambda c: c.macs)
        deployed = frontier.at(Budget(macs=choice.asked.macs))
        reached = outcome(table, choice.thresholds)
        for batch in (1, 64):
            count_ = 256 if batch == 1 else 1024
            session = Session(deployed, x[:1], threads=1, batches=(1, 4, 16, batch))
            check_equivalent(deployed, session, x[:256])
            groups = x[:count_].split(batch)
            engines = dense_engines(static, groups[0])
            runs = {"session": partial(each, session, groups)}
            runs |= {n: partial(each, lambda b, engine=e: engine([b]), groups) for n, e in engines.items()}
            with torch.no_grad():
                seconds = paired(runs, rounds=args.rounds)
            best = min(engines, key=lambda n: np.median(seconds[n]))
            faster, low, high = ratio(seconds[best], seconds["session"])
            speeds.append({
                "static": name, "batch": batch, "threads": 1, "static_accuracy": right, "accuracy": reached.accuracy,
                "static_macs": rows[-1]["macs"], "macs": reached.macs, "best_engine": best,
                "static_images_per_s": count_ / float(np.median(seconds[best])),
                "images_per_s": count_ / float(np.median(seconds["session"])), "times": faster,
                "spread": f"{low:.2f}-{high:.2f}",
            })  # fmt: skip
    args.results.mkdir(exist_ok=True)
    write(args.results / "cifar10_frontier.csv", [{**row, **about} for row in rows])
    write(args.results / "cifar10_speed.csv", [{**row, **about} for row in speeds])
    for row in rows + speeds:
        print({k: (round(v, 4) if isinstance(v, float) else v) for k, v in row.items()})


if __name__ == "__main__":
    main()
