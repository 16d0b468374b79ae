"""CIFAR-10: one network made dynamic in many ways, each beside the static networks of the same recipe.

    python recipes/cifar10_mechanisms.py train layer_skip --data DIR      # a name of NETWORKS, or several
    python recipes/cifar10_mechanisms.py measure --data DIR

A small ResNet (stem stride 2) is trained as it is, at smaller widths, and with each mechanism; same images, epochs,
optimiser and seed. For every mechanism `measure` writes test accuracy and the MACs really spent, and beside them

- the full network (nothing skipped, trained without gates),
- the static network of the same MACs: accuracies of the two nearest widths, interpolated in the logarithm of the MACs,
- random gates of the same rates: the trained network, every decision replaced by another image's of the batch.

Then the session is timed against the same weights without skipping, as `dynanet bench` does. What falls short is
written too.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dynanet import Budget, CostModel, Gate, convert, execute, forced, record, zoo
from dynanet.bench.compare import compare
from dynanet.bench.machine import append_rows
from dynanet.experiment import Data, open_problem
from dynanet.gates.recurrent import RecurrentGate
from dynanet.gates.rules import Gumbel
from dynanet.gates.scorers import PooledScorer
from dynanet.mechanisms.channel_skip import ChannelSkip, SaliencyL1, fbs_gate
from dynanet.mechanisms.layer_skip import BranchSkip, RecurrentSkip
from dynanet.mechanisms.path_select import PathSelect, PickPaths
from dynanet.mechanisms.policy_skip import PolicySkip
from dynanet.mechanisms.pondering import PonderLoss, PonderNet
from dynanet.train import (
    CrossEntropy,
    Within,
    fit,
    load_weights,
    newest,
    one_cycle,
    recalibrate_batchnorm,
    sgd,
    tighten_budget,
)  # fmt: skip

WIDTHS, DEPTHS = (24, 48, 96), (2, 2, 2)


@dataclass
class Recipe:
    """A network, and what it is trained for.

    Attributes:
        build: the network.
        objective: from its cost model to the objective and the schedules.
    """

    build: Callable[[], nn.Module]
    objective: Callable[[CostModel], tuple[Callable, Sequence[Callable]]] = lambda cost: (CrossEntropy(), ())


def static(width=1.0):
    """The network without gates."""
    return zoo.static_resnet(num_classes=10, widths=WIDTHS, depths=DEPTHS, width_multiplier=width)


def within(share, weight=4.0):
    """Cross-entropy and a budget, a share of the static network's MACs, tightened over the first half of training."""

    def objective(cost):
        full = CostModel(static(), torch.zeros(1, 3, 32, 32)).full
        budget = Within(Budget(macs=share * full), cost)
        return CrossEntropy() + weight * budget, (tighten_budget(budget),)

    return objective


def layer_skip():
    """A gate at every block but the first, which holds the stem."""

    def gated(block):
        return BranchSkip(block.branch, Gate(PooledScorer(inputs(block)), Gumbel()), block.shortcut, nn.ReLU())

    return convert(static(), {"[1-5]": gated})


def recurrent_skip():
    """The same blocks, one recurrent gate for all of them."""
    first, *blocks, exit_ = static()
    gate = RecurrentGate([inputs(block) for block in blocks], Gumbel())
    return nn.Sequential(first, RecurrentSkip(blocks, gate, [block.shortcut for block in blocks]), exit_)


def policy_skip():
    """The same blocks; a small network looks at the image and decides on all of them at once."""
    first, *blocks, exit_ = static()
    look = nn.Sequential(
        *(nn.Conv2d(3, 16, 5, 4, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        PooledScorer(32, units=len(blocks)),
    )
    policy = Gate(look, Gumbel(), units=len(blocks))
    return PolicySkip(policy, blocks, [block.shortcut for block in blocks], before=first, after=exit_)


def path_select():
    """Every block but the first, or a 1x1 convolution in its place."""

    def two_ways(block):
        conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
        cheap = nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride, bias=False)
        cheap = nn.Sequential(cheap, nn.BatchNorm2d(conv.out_channels), nn.ReLU())
        return PathSelect(
            [cheap, block], Gate(PooledScorer(conv.in_channels, 2, bias=0.0), PickPaths(noise=True), units=2)
        )

    return convert(static(), {"[1-5]": two_ways})


def channel_skip():
    """In every block but the first, two of four channel groups between its convolutions, the most salient ones."""

    def gated(block):
        first, norm, _, second, last = block.branch
        gates = [fbs_gate(first.in_channels, 4, 0.5), fbs_gate(second.in_channels, 1, 1.0)]
        afters = [nn.ReLU(), nn.Identity()]
        block.branch = ChannelSkip([first, second], gates, [4, 1], norms=[norm, last], afters=afters, boost=True)
        return block

    return convert(static(), {"[1-5]": gated})


def pondernet():
    """Exits after every block, and a learnt probability to stop there."""
    staged = zoo.staged_resnet(num_classes=10, widths=WIDTHS, depths=DEPTHS)
    channels = [width for width, depth in zip(WIDTHS, DEPTHS, strict=True) for _ in range(depth)]
    return PonderNet(staged.stages, staged.exits, [PooledScorer(c, bias=-2.0) for c in channels[:-1]])


def inputs(block):
    """Channels that a block takes."""
    return next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels


STATIC = {f"static-{width}": Recipe(partial(static, width)) for width in (0.5, 0.7, 0.85, 1.0)}
NETWORKS = {
    "layer_skip": Recipe(layer_skip, within(0.5)),
    "recurrent_skip": Recipe(recurrent_skip, within(0.5)),
    "policy_skip": Recipe(policy_skip, within(0.5)),
    "path_select": Recipe(path_select, within(0.5)),
    "channel_skip": Recipe(channel_skip, lambda cost: (CrossEntropy() + 1e-8 * SaliencyL1(), ())),
    "pondernet": Recipe(pondernet, lambda cost: (PonderLoss(prior=0.4), ())),
}


def train(names, args, problem):
    """Train networks one after another; what was begun goes on."""
    for name in names:
        torch.manual_seed(args.seed)
        model = (STATIC | NETWORKS)[name].build()
        cost = CostModel(model, problem.example())
        objective, schedules = (STATIC | NETWORKS)[name].objective(cost)
        run = fit(
            model, problem.train, problem.held_out, objective=objective, epochs=args.epochs, folder=args.runs / name,
            optimizer=sgd(0.2, weight_decay=5e-4), scheduler=one_cycle(), schedules=schedules, cost=cost,
            seed=args.seed, resume=True, progress=False, trainer_options={"precision": "bf16-mixed"},
        )  # fmt: skip
        print(name, {key: round(value, 4) for key, value in run.metrics.items()}, flush=True)


def trained(name, recipe, args, problem):
    """A trained network with fresh batch norms for the rows that really run, and its cost model."""
    model = recipe.build()
    load_weights(model, newest(args.runs / name))
    recalibrate_batchnorm(execute(model, sparse=True), problem.train, batches=100)
    return model.eval(), CostModel(model, problem.example())


def evaluate(model, cost, batches, decide=None):
    """(accuracy, MACs per sample) in the sparse form; `decide` replaces decisions."""
    right = spent = seen = 0
    for x, y in batches:
        with torch.no_grad(), record(model) as trace, forced(model, decide) if decide else nullcontext():
            right += int((model(x).argmax(1) == y).sum())
        spent, seen = spent + float(cost.spent(trace).sum()), seen + len(y)
    return right / seen, spent / seen


def of_another(decision):
    """The keep of another row of the batch: the same rate, and no longer this input's."""
    return decision.keep[torch.randperm(len(decision.keep))]


def measure(args, problem):
    """Accuracies and MACs of all that was trained, then speeds."""
    torch.manual_seed(args.seed)
    about = {"data": problem.title, "epochs": args.epochs, "seed": args.seed}
    curve = []
    for name, recipe in STATIC.items():
        model, cost = trained(name, recipe, args, problem)
        curve.append((*evaluate(model, cost, problem.test)[::-1], name))
    macs, accuracies, _ = zip(*sorted(curve), strict=True)
    rows = [{"network": name, "macs": m, "accuracy": accuracy} for m, accuracy, name in sorted(curve)]
    samples = torch.cat([x for x, _ in problem.test])[:512]
    for name, recipe in NETWORKS.items():
        if not (args.runs / name).exists():
            continue
        model, cost = trained(name, recipe, args, problem)
        accuracy, spent = evaluate(model, cost, problem.test)
        at_random, random_macs = evaluate(model, cost, problem.test, of_another)
        rows.append({
            "network": name, "macs": spent, "accuracy": accuracy, "full_macs": macs[-1], "full_accuracy": accuracies[-1],
            "static_accuracy": float(np.interp(np.log(spent), np.log(macs), accuracies)),
            "random_accuracy": at_random, "random_macs": random_macs,
        })  # fmt: skip
        speeds = compare(model, samples, threads=[1], rounds=args.rounds, tell=print)
        append_rows(args.results / "cifar10_mechanisms_speed.csv", [asdict(row) for row in speeds], {"network": name})
    append_rows(args.results / "cifar10_mechanisms.csv", rows, about)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("names", nargs="*", default=[*STATIC, *NETWORKS])
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10_mechanisms"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    problem = open_problem(Data("parquet", place=args.data, held_out=5000), batch=128, seed=args.seed)
    if args.what == "train":
        train(args.names, args, problem)
    else:
        measure(args, problem)


if __name__ == "__main__":
    main()
