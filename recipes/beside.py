"""What a mechanism is worth: trained beside static networks by the same recipe, compared with them and with chance.

Shared by `cifar10_mechanisms.py` and `text_mechanisms.py`. For every mechanism `measure` writes test accuracy and the
MACs really spent, and beside them

- the full network (nothing skipped, trained without gates): the dearest static one,
- the static network of the same MACs: accuracies of the two nearest sizes, interpolated in the logarithm of the MACs,
- random gates of the same rates: the trained network, every decision replaced by that of another row of the batch.

Then the session is timed against the same weights without skipping, as `dynanet bench` does. What falls short is
written too.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dynanet import CostModel, execute, forced, record
from dynanet.bench.compare import compare
from dynanet.bench.machine import append_rows
from dynanet.train import Batches, CrossEntropy, fit, load_weights, newest, one_cycle, recalibrate_batchnorm


@dataclass
class Recipe:
    """A network, and what it is trained for.

    Attributes:
        build: the network.
        objective: from its cost model to the objective and the schedules.
    """

    build: Callable[[], nn.Module]
    objective: Callable[[CostModel], tuple[Callable, Sequence[Callable]]] = lambda cost: (CrossEntropy(), ())


@dataclass
class Experiment:
    """Networks on data.

    Attributes:
        name: of the files in results/.
        title: what the data is.
        static: networks of several sizes without gates, by name.
        dynamic: those with gates.
        train: batches.
        held_out: batches.
        test: batches, looked at once.
        samples: test inputs of one shape, for prices and timing; 256 or more.
        optimizer: as for `train.fit`.
        precision: as for Lightning's Trainer.
    """

    name: str
    title: str
    static: dict[str, Recipe]
    dynamic: dict[str, Recipe]
    train: Batches
    held_out: Batches
    test: Batches
    samples: torch.Tensor
    optimizer: Callable
    precision: str = "32-true"

    def run(self, args):
        """Train the networks that were named, or measure all that were trained."""
        torch.set_num_threads(1)
        if args.what == "train":
            for name in args.names or [*self.static, *self.dynamic]:
                self._train(name, args)
        else:
            self._measure(args)

    def _train(self, name, args):
        torch.manual_seed(args.seed)
        recipe = (self.static | self.dynamic)[name]
        model = recipe.build()
        cost = CostModel(model, self.samples[:1])
        objective, schedules = recipe.objective(cost)
        run = fit(
            model, self.train, self.held_out, objective=objective, epochs=args.epochs, folder=args.runs / name,
            optimizer=self.optimizer, scheduler=one_cycle(), schedules=schedules, cost=cost, seed=args.seed,
            resume=True, progress=False, trainer_options={"precision": self.precision},
        )  # fmt: skip
        print(name, {key: round(value, 4) for key, value in run.metrics.items()}, flush=True)

    def _trained(self, name, recipe, args):
        """With fresh batch norms for the rows that really run; and its cost model."""
        model = recipe.build()
        load_weights(model, newest(args.runs / name))
        recalibrate_batchnorm(execute(model, sparse=True), self.train, batches=100)
        return model.eval(), CostModel(model, self.samples[:1])

    def _measure(self, args):
        torch.manual_seed(args.seed)
        about = {"data": self.title, "epochs": args.epochs, "seed": args.seed}
        curve = []
        for name, recipe in self.static.items():
            accuracy, spent = evaluate(*self._trained(name, recipe, args), self.test)
            curve.append((spent, accuracy, name))
        macs, accuracies, _ = zip(*sorted(curve), strict=True)
        rows = [{"network": name, "macs": m, "accuracy": accuracy} for m, accuracy, name in sorted(curve)]
        for name, recipe in self.dynamic.items():
            if not (args.runs / name).exists():
                continue
            model, cost = self._trained(name, recipe, args)
            accuracy, spent = evaluate(model, cost, self.test)
            at_random, random_macs = evaluate(model, cost, self.test, of_another)
            rows.append({
                "network": name, "macs": spent, "accuracy": accuracy, "full_macs": macs[-1],
                "full_accuracy": accuracies[-1],
                "static_accuracy": float(np.interp(np.log(spent), np.log(macs), accuracies)),
                "random_accuracy": at_random, "random_macs": random_macs,
            })  # fmt: skip
            print(rows[-1], flush=True)
            speeds = compare(model, self.samples, threads=[1], rounds=args.rounds, tell=print)
            append_rows(args.results / f"{self.name}_speed.csv", [asdict(row) for row in speeds], {"network": name})
        append_rows(args.results / f"{self.name}.csv", rows, about)


def evaluate(model, cost, batches, decide=None):
    """(accuracy, MACs per sample) in the sparse form; `decide` replaces decisions."""
    right = spent = seen = 0
    for x, y in batches:
        with torch.no_grad(), record(model) as trace, forced(model, decide) if decide else nullcontext():
            right += int((model(x).argmax(1) == y).sum())
        spent, seen = spent + float(cost.spent(trace).sum()), seen + len(y)
    return right / seen, spent / seen


def of_another(decision):
    """The keep of another row: the same rate, and no longer this input's."""
    keep = decision.keep.flatten(0, -2)
    return keep[torch.randperm(len(keep))].view_as(decision.keep)


def arguments(description, name, epochs):
    """What the recipes take from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("names", nargs="*", help="of networks to train; all if none")
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs") / name)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()
