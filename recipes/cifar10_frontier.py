"""CIFAR-10: the trained networks with exits at many budgets, beside the static networks of the same recipe.

    python recipes/cifar10_frontier.py --data DIR --runs runs/cifar10 --results results
    python recipes/cifar10_frontier.py --data DIR --runs runs/cifar10_short --name cifar10_short     # 3 epochs, RANet too

Thresholds are fitted on the 5,000 held-out images. For every pair of a network with exits and a static one, the cheapest
budget is taken whose *held-out* accuracy reaches the static one's; then both are timed in one process, each in its best
engine, on the test images in their own order. All cells are written, whatever they say. Runs that are not there are left
out.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from dynanet import Budget, CostModel, zoo
from dynanet.bench.comparison import check_equivalent, dense_engines
from dynanet.bench.machine import facts
from dynanet.bench.timing import paired, ratio
from dynanet.calibrate import anytime_curve, calibrate, outcome, random_exits, tabulate
from dynanet.core.files import write_csv
from dynanet.core.macs import CountMacs
from dynanet.data.augment import channel_stats, normalise
from dynanet.data.parquet import load_parquet
from dynanet.data.splits import hold_out
from dynanet.mechanisms.cascade import Cascade
from dynanet.session import Session

EXITING = {
    "staged": partial(zoo.staged_resnet, num_classes=10, depths=(1, 2, 2), context=64),
    "msdnet": partial(zoo.msdnet, num_classes=10),
    "ranet": partial(zoo.ranet, num_classes=10),
}
STATIC = {
    f"static-{width}": partial(zoo.static_resnet, num_classes=10, depths=(1, 2, 2), width_multiplier=width)
    for width in (0.5, 0.7, 1.0)
}


@dataclass
class Images:
    """Normalised images and their labels."""

    x: torch.Tensor
    y: torch.Tensor

    def loader(self):
        """In their own order."""
        return DataLoader(TensorDataset(self.x, self.y), 250)

    def accuracy(self, model):
        """Of a network with one answer."""
        with torch.no_grad():
            parts = zip(self.x.split(500), self.y.split(500), strict=True)
            return float(sum((model(x).argmax(1) == y).sum() for x, y in parts)) / len(self.y)


@dataclass
class Trained:
    """A network, and for how many epochs it was trained."""

    model: torch.nn.Module
    epochs: int


def trained(runs: Path, builds: dict[str, Callable]):
    """The networks whose runs are there, by name."""
    found = {}
    for name, build in builds.items():
        if (runs / name / "state.pt").exists():
            saved = torch.load(runs / name / "state.pt", weights_only=True)
            found[name] = Trained(build(), saved["epoch"])
            found[name].model.load_state_dict(saved["model"])
            found[name].model.eval()
    return found


def each(run, groups):
    for group in groups:
        run(group)


def frontier_rows(name, network, frontier, table):
    """Everything at each exit, and twenty budgets."""
    for k, point in enumerate(anytime_curve(table)):
        yield {"network": f"{name}, all at exit {k + 1}", "macs": point.macs, "accuracy": point.accuracy,
               "epochs": network.epochs}  # fmt: skip
    for choice in frontier.curve(20):
        reached = outcome(table, choice.thresholds)
        yield {
            "network": f"{name}, early exit", "asked_macs": choice.budget.macs, "macs": reached.macs,
            "accuracy": reached.accuracy, "held_out_accuracy": choice.accuracy,
            "random_exits_accuracy": random_exits(table, reached.share).accuracy,
            "shares": " ".join(f"{s:.3f}" for s in reached.share), "epochs": network.epochs,
        }  # fmt: skip


def static_row(name, network, held_out, test):
    with CountMacs() as count, torch.no_grad():
        network.model(test.x[:1])
    return {
        "network": name, "macs": count.total, "accuracy": test.accuracy(network.model),
        "held_out_accuracy": held_out.accuracy(network.model), "epochs": network.epochs,
    }  # fmt: skip


def speed_rows(name, frontier, table, static, row, x, rounds):
    """Images per second at equal held-out accuracy, at batches of 1 and 64."""
    about = {"network": name, "static": row["network"], "static_accuracy": row["accuracy"], "static_macs": row["macs"]}
    enough = [choice for choice in frontier.curve(60) if choice.accuracy >= row["held_out_accuracy"]]
    if not enough:
        yield {**about, "note": "no budget reaches its held-out accuracy"}
        return
    choice = min(enough, key=lambda c: c.macs)
    deployed = frontier.at(Budget(macs=choice.budget.macs))
    reached = outcome(table, choice.thresholds)
    for batch in (1, 64):
        images = x[: 256 if batch == 1 else 1024]
        session = Session(deployed, x[:1], threads=1, batches=(1, 4, 16, batch))
        check_equivalent(deployed, session, x[:256])
        groups = images.split(batch)
        engines = dense_engines(static.model, groups[0])
        runs = {"session": partial(each, session, groups)}
        runs |= {n: partial(each, lambda b, engine=e: engine([b]), groups) for n, e in engines.items()}
        with torch.no_grad():
            seconds = paired(runs, rounds=rounds)
        best = min(engines, key=lambda n: np.median(seconds[n]))
        faster, low, high = ratio(seconds[best], seconds["session"])
        yield {
            **about, "batch": batch, "threads": 1, "accuracy": reached.accuracy, "macs": reached.macs,
            "best_engine": best, "static_images_per_s": len(images) / float(np.median(seconds[best])),
            "images_per_s": len(images) / float(np.median(seconds["session"])), "times": faster,
            "spread": f"{low:.2f}-{high:.2f}",
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--name", default="cifar10", help="what the files of results begin with")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)

    train, held_out = hold_out(load_parquet(args.data, "train").to_memory(), 5000, seed=0)
    test = load_parquet(args.data, "test").to_memory()
    mean, std = channel_stats(train.images)
    test = Images(normalise(test.images, mean, std), test.labels)
    held_out = Images(normalise(held_out.images, mean, std), held_out.labels)

    static = trained(args.runs, STATIC)
    rows = [static_row(name, network, held_out, test) for name, network in static.items()]
    static_rows, speeds = list(rows), []
    exiting = trained(args.runs, EXITING)
    if {"static-0.5", "static-1.0"} <= static.keys():
        small, large = static["static-0.5"], static["static-1.0"]
        exiting["cascade"] = Trained(Cascade([small.model, large.model]).eval(), small.epochs + large.epochs)
    for name, network in exiting.items():
        cost = CostModel(network.model, test.x[:1])
        frontier = calibrate(network.model, held_out.loader(), cost)
        table = tabulate(network.model, test.loader(), cost)
        rows += frontier_rows(name, network, frontier, table)
        for row in static_rows:
            speeds += speed_rows(name, frontier, table, static[row["network"]], row, test.x, args.rounds)
    about = {"data": "CIFAR-10 (JPEG re-encoding), test", "seed": 0, **facts()}
    args.results.mkdir(exist_ok=True)
    write_csv(args.results / f"{args.name}_frontier.csv", [{**row, **about} for row in rows])
    write_csv(args.results / f"{args.name}_speed.csv", [{**row, **about} for row in speeds])
    for row in rows + speeds:
        print({k: (round(v, 4) if isinstance(v, float) else v) for k, v in row.items()})


if __name__ == "__main__":
    main()
