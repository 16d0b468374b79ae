"""What a mechanism is worth: trained beside static networks by the same recipe, compared with them and with chance.

Shared by `cifar10_mechanisms.py` and `text_mechanisms.py`. For every mechanism `measure` writes test accuracy and the
MACs really spent, and beside them

- the full network (trained without gates): the dearest static one,
- the static network of the same MACs: accuracies of the two nearest sizes, interpolated in the logarithm of the MACs,
- random gates of the same rates: the trained network, every sample with the decisions of another one of its batch,
- units that are kept for less than 2 % or more than 98 % of the rows: gates that say the same of every input.

`speed` times the session against the same weights without skipping, as `dynanet bench` does: on a quiet machine. What
falls short is written too.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dynanet import CostModel, execute, forced, record
from dynanet.bench.comparison import compare
from dynanet.bench.machine import append_rows
from dynanet.core.dynamic import layers
from dynanet.core.errors import ConfigError
from dynanet.train import (
    Batches,
    CrossEntropy,
    Frozen,
    Objective,
    fit,
    load_weights,
    newest,
    one_cycle,
)
from dynanet.train.checkpoint import step_files


def cross_entropy(model, cost):
    """The objective of networks without gates."""
    return CrossEntropy(), ()


@dataclass
class Recipe:
    """A network, and what it is trained for.

    Attributes:
        build: the network; made of the trained one that `start` names, if it names one.
        objective: from the network and its cost model to the objective and the schedules. None: nothing is trained.
        start: what was trained before. Its epochs count.
        epochs: others than the experiment's.
        optimizer: another than the experiment's.
        frozen: from the network to what of it stands still, norms included.
    """

    build: Callable[..., nn.Module]
    objective: Callable[[nn.Module, CostModel], tuple[Objective, Sequence[Callable]]] | None = cross_entropy
    start: str | None = None
    epochs: int | None = None
    optimizer: Callable | None = None
    frozen: Callable[[nn.Module], Sequence[nn.Module]] = lambda model: ()


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
        sample: one input as long as a batch's, without padding, of which a batch is priced.
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
    sample: Callable[[torch.Tensor], torch.Tensor] = lambda x: x[:1]

    def run(self, args):
        """Train, measure or time the networks that were named; all if none, and of those all that were trained."""
        torch.set_num_threads(1)
        if args.what == "train":
            for name in args.names or [*self.static, *self.dynamic]:
                self._train(name, args)
        elif args.what == "measure":
            self._measure(args)
        else:
            self._speed(args)

    def _train(self, name, args):
        recipe = self.recipes[name]
        if recipe.start is not None and not self.there(recipe.start, args):
            self._train(recipe.start, args)
        torch.manual_seed(args.seed)
        model = self._begun(name, args)
        if recipe.objective is None:
            return
        cost = CostModel(model, self.samples[:1])
        objective, schedules = recipe.objective(model, cost)
        run = fit(
            model, self.train, self.held_out, objective=objective, epochs=recipe.epochs or args.epochs,
            folder=args.runs / name, optimizer=recipe.optimizer or self.optimizer, scheduler=one_cycle(),
            schedules=schedules, cost=cost, seed=args.seed, resume=True, progress=False,
            callbacks=[Frozen(*recipe.frozen(model))], trainer_options={"precision": self.precision},
        )  # fmt: skip
        print(name, {key: round(value, 4) for key, value in run.metrics.items()}, flush=True)

    @property
    def recipes(self):
        """All, by name."""
        return self.static | self.dynamic

    def trained(self, name, args):
        """In eval mode, with the statistics that its batch norms had in training."""
        return self.finished(name, args).eval()

    def there(self, name, args):
        """Was it trained to the end, with all that it begins with?"""
        recipe = self.recipes[name]
        begun = recipe.start is None or self.there(recipe.start, args)
        steps = (recipe.epochs or args.epochs) * len(self.train)
        return begun and (recipe.objective is None or steps in step_files(args.runs / name))

    def epochs(self, name, args):
        """Of training, those of what it begins with included."""
        recipe = self.recipes[name]
        own = args.epochs if recipe.objective else 0
        return (recipe.epochs or own) + (self.epochs(recipe.start, args) if recipe.start else 0)

    def finished(self, name, args):
        """As it was after the last step of training."""
        if not self.there(name, args):
            raise ConfigError(f"{name}, or what it begins with, is not in {args.runs}; train that first")
        model = self._begun(name, args)
        if self.recipes[name].objective is not None:
            load_weights(model, newest(args.runs / name))
        return model

    def _begun(self, name, args):
        recipe = self.recipes[name]
        if recipe.start is None:
            return recipe.build()
        return recipe.build(self.finished(recipe.start, args))

    def _measure(self, args):
        torch.manual_seed(args.seed)
        curve, rows = [], []
        wanted = args.names or [*self.static, *self.dynamic]
        for name in [*self.static, *self.dynamic]:  # the static ones always: they are the curve to compare with
            if name in self.dynamic and not (name in wanted and self.there(name, args)):
                continue
            model = self.trained(name, args)
            accuracy, spent, full, rates = evaluate(model, self.test, self.sample)
            row = {
                "network": name, "macs": spent, "own_macs": full, "accuracy": accuracy, "epochs": self.epochs(name, args),
                "parameters": sum(p.numel() for p in model.parameters()),
            }  # fmt: skip
            if name in self.static:
                curve = sorted([*curve, row], key=lambda row: row["macs"])
            else:
                row |= {"full_macs": curve[-1]["macs"], "full_accuracy": curve[-1]["accuracy"]}
                row["static_accuracy"] = at_same_macs(row, curve)
            if layers(model):
                row["units"], row["constant_units"] = len(rates), int(((rates < 0.02) | (rates > 0.98)).sum())
                row["random_accuracy"], row["random_macs"], *_ = evaluate(model, self.test, self.sample, exchanged=True)
            if name in wanted:
                rows.append(row)
                print(row, flush=True)
        append_rows(args.results / f"{self.name}.csv", rows, {"data": self.title, "seed": args.seed})

    def _speed(self, args):
        for name in args.names or self.dynamic:
            if self.there(name, args):
                model = self.trained(name, args)
                rows = compare(
                    model, self.samples, threads=[1], rounds=args.rounds, full=self.finished([*self.static][-1], args),
                    echo=print,
                )  # fmt: skip
                append_rows(args.results / f"{self.name}_speed.csv", [asdict(row) for row in rows], {"network": name})


def evaluate(model, batches, sample, *, exchanged=False):
    """(accuracy, MACs per sample, MACs of nothing skipped, every unit's share of rows) in the sparse form; if
    `exchanged`, every sample with the decisions of another.

    MACs are those that run in these batches: a batch of longer sentences has dearer ones, padding included that is
    computed.

    Decisions are exchanged in the dense form: there every sample is asked at every exit and node, so that one exchange
    for a whole pass leaves the rates of all exits and leaves as they were.
    """
    execute(model, sparse=not exchanged)
    right = spent = full = seen = 0
    costs, kept, rows = {}, Counter(), Counter()
    for x, y in batches:
        if x.shape[1:] not in costs:
            costs[x.shape[1:]] = CostModel(model, sample(x))
        cost = costs[x.shape[1:]]
        decide = forced(model, of_another(len(y))) if exchanged else nullcontext()
        with torch.no_grad(), record(model) as trace, decide:
            right += int((model(x).argmax(1) == y).sum())
        spent += float(cost.spent(trace).sum()) if layers(model) else cost.full * len(y)
        full += cost.full * len(y)
        seen += len(y)
        for call in trace.calls:
            kept[call.name, call.first] += call.keep.flatten(0, -2).sum(0)
            rows[call.name, call.first] += call.keep[..., 0].numel()
    rates = torch.cat([kept[unit] / rows[unit] for unit in kept]) if kept else torch.zeros(0)
    return right / seen, spent / seen, full / seen, rates


def at_same_macs(row, others):
    """The accuracy of others, interpolated in the logarithm of the MACs; None outside of them."""
    macs, accuracies = zip(*sorted((r["macs"], r["accuracy"]) for r in others), strict=True)
    if not macs[0] <= row["macs"] <= macs[-1]:
        return None
    return float(np.interp(np.log(row["macs"]), np.log(macs), accuracies))


def of_another(samples):
    """The keep of another sample: the same rate, and no longer this input's. Positions of an image: all of another
    image's, so that masks stay as ragged as they are. Tokens: of another row.
    """
    order = torch.randperm(samples)

    def keep(decision):
        if decision.keep.dim() == 4:
            return decision.keep[order]
        rows = decision.keep.flatten(0, -2)
        return rows[order if len(rows) == samples else torch.randperm(len(rows))].view_as(decision.keep)

    return keep


def arguments(description, name, epochs):
    """What the recipes take from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("what", choices=["train", "measure", "speed"])
    parser.add_argument("names", nargs="*", help="of networks to train, measure or time; all if none")
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs") / name)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_intermixed_args()
