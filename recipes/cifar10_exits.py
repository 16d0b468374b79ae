"""CIFAR-10: criteria to leave by, compared on trained networks with exits, at two budgets of MACs each.

    python recipes/cifar10_exits.py train vit vit-1 vit-3 vit-6 --data DIR     # names in `families`; all if none
    python recipes/cifar10_exits.py measure --data DIR                         # all families whose runs are there

Three families, each with static networks by the same recipe: the staged ResNet that `cifar10.py` trained (20 epochs,
runs/cifar10), a small ViT and BranchyNet's AlexNet (6 epochs from scratch). Criteria are fitted and thresholds chosen on
the 5,000 held-out images, for every budget anew; the test images are looked at once. Beside each result stand random
exits at the same rates (in expectation), the static network of the same MACs, and what is reached without the exits that
do not pay. DIR holds the parquet files of the Hugging Face hub's `cifar10`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from beside import Experiment, Recipe, arguments, evaluate
from torch import nn

from dynanet import Budget, CostModel, zoo
from dynanet.bench.machine import append_rows
from dynanet.calibrate import (
    Frontier,
    cost_weight,
    fit_gates,
    fit_scores,
    outcome,
    schedule,
    select_exits,
    tabulate,
    with_exits,
    with_learned_confidence,
)
from dynanet.calibrate.anytime import anytime_curve, random_exits
from dynanet.calibrate.operating_point import choose
from dynanet.experiment import Data
from dynanet.gates.confidence import Entropy, LearnedGate, LearnedScore, MaxProbability, Patience, PerExit
from dynanet.mechanisms.early_exit import JointGates
from dynanet.train import MultiExit, adamw, sgd

BUDGETS = (0.5, 0.3)  # of the last exit's MACs
CRITERIA = {
    "max probability": lambda table, budget: MaxProbability(),
    "entropy": lambda table, budget: Entropy(),
    "patience": lambda table, budget: Patience(),
    "learned gate, post hoc": lambda table, budget: fit_gates(table, cost_weight(table, budget)),
    "learned score": fit_scores,
}
REMEMBERS = (Patience, LearnedScore)  # what such criteria say depends on the exits before, off or not


def every_exit(model, cost):
    """The sum of the exits' cross-entropies."""
    return MultiExit(), ()


def taught(model, cost):
    """The objective that the staged network was trained with."""
    return MultiExit(distill=0.5), ()


def from_cifar10(name, build):
    """A network that `cifar10.py` has trained."""
    model = build()
    model.load_state_dict(torch.load(CIFAR10 / name / "state.pt", weights_only=True)["model"])
    return model


def gated(model):
    """A trained network that gets a gate at every exit."""
    model.confidence = PerExit([LearnedGate() for _ in model.exits[:-1]])
    return model


def jointly(share, held_out):
    """Gates trained with the classifiers; a MAC costs what makes the best exits spend this share on held-out images."""

    def objective(model, cost):
        macs = np.cumsum([cost.always, *cost.unit[""].tolist()])
        table = tabulate(model, held_out, cost, keep_logits=True)
        return JointGates(macs, cost_weight(table, Budget(macs=share * macs[-1]))), ()

    return objective


def cut_alexnet(exits):
    """AlexNet up to one of its exits, without those before."""
    model = zoo.branchy_alexnet(num_classes=10)
    return nn.Sequential(*model.stages[:exits], model.exits[exits - 1])


CIFAR10 = Path("runs/cifar10")
STAGED = partial(zoo.staged_resnet, num_classes=10, depths=(1, 2, 2), context=64)
VIT = {"num_classes": 10, "width": 48, "heads": 2}
SMALL_STEPS = adamw(1e-3)  # for networks without batch norms


@dataclass
class Family:
    """Networks of one kind.

    Attributes:
        static: of several sizes, with one exit each.
        exiting: the first of them must be there.
        budgets: as shares of the last exit's MACs; the first exit must be cheaper.
    """

    static: dict[str, Recipe]
    exiting: dict[str, Recipe]
    budgets: tuple[float, ...] = BUDGETS


def families(held_out):
    """By name."""
    static_resnet = partial(zoo.static_resnet, num_classes=10, depths=(1, 2, 2))
    more = {"start": "staged", "epochs": 2, "optimizer": sgd(0.02, weight_decay=5e-4)}
    found = {
        "staged": Family(
            {
                f"static-{width}": Recipe(
                    partial(from_cifar10, f"static-{width}", partial(static_resnet, width_multiplier=width)),
                    None, epochs=20,
                )
                for width in (0.5, 0.7, 1.0)
            },
            {
                "staged": Recipe(partial(from_cifar10, "staged", STAGED), None, epochs=20),
                "staged-longer": Recipe(lambda model: model, taught, **more),
                **{f"staged-joint-{share}": Recipe(gated, jointly(share, held_out), **more) for share in BUDGETS},
            },
        ),
        "vit": Family(
            {
                f"vit-{depth}": Recipe(partial(zoo.vit_static, **VIT, depth=depth), optimizer=SMALL_STEPS)
                for depth in (1, 3, 6)
            },
            {"vit": Recipe(partial(zoo.vit_exits, **VIT, exits=(0, 1, 3, 5)), every_exit, optimizer=SMALL_STEPS)},
        ),
        "branchynet": Family(
            {f"alexnet-{k}": Recipe(partial(cut_alexnet, k), optimizer=SMALL_STEPS) for k in (1, 2, 3)},
            {"branchynet": Recipe(partial(zoo.branchy_alexnet, num_classes=10), every_exit, optimizer=SMALL_STEPS)},
            budgets=(0.8, 0.65),  # its first exit costs 57 %
        ),
    }  # fmt: skip
    return found if (CIFAR10 / "staged" / "state.pt").exists() else {k: v for k, v in found.items() if k != "staged"}


def measure(experiment, family, args):
    """The rows of a family."""
    rows, curve = [], []
    for name in family.static:
        model, _ = finished(name, experiment, args)
        accuracy, macs, *_ = evaluate(model, experiment.test, experiment.sample)
        curve.append((macs, accuracy))
        rows.append({"network": name, "macs": macs, "accuracy": accuracy, "epochs": experiment.epochs(name, args)})
    macs, accuracies = zip(*sorted(curve), strict=True)
    for name in family.exiting:
        if experiment.there(name, args):
            for row in of_network(name, family.budgets, experiment, args):
                beside = float(np.interp(np.log(row["macs"]), np.log(macs), accuracies))
                about = {"network": name, "epochs": experiment.epochs(name, args)}
                rows.append({**about, **row, "static_accuracy": beside, "full_accuracy": accuracies[-1]})
                print(rows[-1], flush=True)
    return rows


def finished(name, experiment, args):
    """A network in eval mode and its cost model."""
    model = experiment.finished(name, args).eval()
    return model, CostModel(model, experiment.samples[:1])


def of_network(name, budgets, experiment, args):
    """Every exit alone, then every criterion at every budget."""
    model, cost = finished(name, experiment, args)
    held_out, test = (
        Frontier(model, tabulate(model, part, cost, keep_logits=True))
        for part in (experiment.held_out, experiment.test)
    )
    for k, point in enumerate(anytime_curve(test.table)):
        yield {"criterion": f"all at exit {k + 1}", "macs": point.macs, "accuracy": point.accuracy}
    sample = experiment.samples[:1]
    for share in budgets:
        budget = Budget(macs=share * held_out.table.mean_macs[-1])
        if isinstance(model.confidence, PerExit):
            if name.endswith(str(share)):
                yield reached("learned gate, joint", share, held_out, test, budget, sample)
            continue
        for criterion, fit in CRITERIA.items():
            confidence = fit(held_out.table, budget)
            yield reached(
                criterion,
                share,
                with_learned_confidence(held_out, confidence),
                with_learned_confidence(test, confidence),
                budget,
                sample,
            )
        planned = schedule(held_out, budget)
        done = with_learned_confidence(test, PerExit([planned.confidence.at(k) for k in range(planned.steps - 1)]))
        yield row_of("learned score, scheduled", share, budget, outcome(done.table, planned.thresholds.numpy()), done)


def reached(criterion, share, held_out, test, budget, sample):
    """Thresholds from held-out images on test images; and the same without the exits that do not pay."""
    choice = held_out.choose(budget)
    row = row_of(criterion, share, budget, outcome(test.table, choice.thresholds), test)
    row["held_out_accuracy"] = choice.accuracy
    confidence = held_out.model.confidence
    if isinstance(confidence.at(0), REMEMBERS):
        return row
    macs = held_out.model.exit_macs(sample)
    exits = select_exits(held_out.table, macs, budget)
    left = with_exits(held_out.table, exits, macs)
    bound = Budget(macs=min(budget.macs, float(left.mean_macs.max())))
    fewer = outcome(with_exits(test.table, exits, macs), choose(left, bound).thresholds)
    return row | {
        "paying_exits": " ".join(str(k + 1) for k in exits), "paying_macs": fewer.macs,
        "paying_accuracy": fewer.accuracy,
    }  # fmt: skip


def row_of(criterion, share, budget, done, test):
    """What was reached on test images, and by lot."""
    return {
        "criterion": criterion, "budget": share, "asked_macs": budget.macs, "macs": done.macs,
        "accuracy": done.accuracy, "random_accuracy": random_exits(test.table, done.share).accuracy,
        "shares": " ".join(f"{s:.3f}" for s in done.share),
    }  # fmt: skip


if __name__ == "__main__":
    args = arguments(__doc__.split("\n")[0], "cifar10_exits", epochs=6)
    problem = Data("parquet", place=args.data, held_out=5000).open(batch=128, seed=args.seed)
    samples = torch.cat([x for (x, _), _ in zip(problem.test, range(2), strict=False)])
    found = families(problem.held_out)
    experiment = Experiment(
        "cifar10_exits", problem.title, {k: v for family in found.values() for k, v in family.static.items()},
        {k: v for family in found.values() for k, v in family.exiting.items()}, problem.train, problem.held_out,
        problem.test, samples, sgd(0.2, weight_decay=5e-4),
    )  # fmt: skip
    if args.what == "measure":
        torch.set_num_threads(1)
        torch.manual_seed(args.seed)
        rows = [
            {"family": name, **row}
            for name, family in found.items()
            if all(experiment.there(needed, args) for needed in (*family.static, next(iter(family.exiting))))
            for row in measure(experiment, family, args)
        ]
        append_rows(args.results / "cifar10_exits.csv", rows, {"data": problem.title, "seed": args.seed})
    else:
        experiment.run(args)
