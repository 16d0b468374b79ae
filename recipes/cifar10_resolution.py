"""CIFAR-10: a size per image, and glimpses of parts of it, beside the static networks of the same recipe (`beside.py`).

    python recipes/cifar10_resolution.py train resolution --data DIR      # a name of DYNAMIC, or several; all if none
    python recipes/cifar10_resolution.py measure --data DIR

The static networks are those of `cifar10_mechanisms.py`, in its runs; whatever is not there yet is trained here. Two
more see the image at a fixed size: what a size per image has to beat. Networks with glimpses are measured as trained,
all glimpses taken, and with exits at thresholds for shares of the full network's MACs, chosen on held-out images. DIR
holds the parquet files of the Hugging Face hub's `cifar10`.
"""

from functools import partial

import torch
from beside import Experiment, Recipe, arguments
from cifar10_mechanisms import STATIC, WIDTHS, static, within
from torch import nn

from dynanet import Budget, CostModel, Gate
from dynanet.calibrate import calibrate
from dynanet.experiment import Data
from dynanet.gates.rules import RelaxedTopK
from dynanet.gates.scorers import PooledScorer
from dynanet.mechanisms.glance_focus import (
    GlanceFocus,
    LearnedCrops,
    PlacePolicy,
    PlaceReward,
    RandomCrops,
    RecurrentHead,
    SampledCrops,
)
from dynanet.mechanisms.resolution_select import ResolutionSelect
from dynanet.nets.spatial_transformer import Resize
from dynanet.train import MultiExit, adamw, sgd

SIZES = (16, 24, 32)
SHARES = (0.5, 0.7)  # of the full static network's MACs, for networks with exits


def resolution():
    """The full network at one of three sizes; a small one looks at 16 x 16 pixels and picks."""
    look = nn.Sequential(
        Resize(16),
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        PooledScorer(16, units=len(SIZES), bias=0.0),
    )
    return ResolutionSelect(static(), SIZES, Gate(look, RelaxedTopK(noise=True, hard=True), units=len(SIZES)))


def at_size(side):
    """The full network at one size for all."""
    return nn.Sequential(Resize(side), static())


def glance(places):
    """The full network without its head, twice: for the image at 20 x 20 pixels, and for two crops of 16 x 16."""
    policy, head = PlacePolicy(WIDTHS[-1], width=16, hidden=64, grid=3), RecurrentHead(WIDTHS[-1], 96, 10)
    encoders = static()[:-1], static()[:-1]
    return GlanceFocus(*encoders, policy, head, glance_size=20, crop_size=16, glimpses=3, places=places)


def with_places(places, model):
    """A trained network whose crops are taken otherwise."""
    model.places = places
    return model


def every_glimpse(model, cost):
    """The sum of the glimpses' cross-entropies."""
    return MultiExit(), ()


def with_exits(held_out, share, model):
    """At thresholds for a share of the full static network's MACs."""
    example = next(iter(held_out))[0][:1]
    budget = Budget(macs=share * CostModel(static(), example).full)
    return calibrate(model, held_out, CostModel(model, example)).at(budget)


def dynamic(held_out):
    """By name; the stages of the glimpses' training begin with each other."""
    found = {
        **{f"size-{side}": Recipe(partial(at_size, side)) for side in SIZES[:-1]},
        "resolution": Recipe(resolution, within(0.5)),
        "glance_steered": Recipe(partial(glance, LearnedCrops()), every_glimpse),
        "glance_anywhere": Recipe(partial(glance, RandomCrops()), every_glimpse),
        # Encoders and head stand still while the policy learns by what its crops were worth; then the other way round.
        "glance_drawn": Recipe(
            partial(with_places, SampledCrops(0.15)), lambda model, cost: (PlaceReward(), ()), start="glance_anywhere",
            epochs=2, optimizer=adamw(1e-3), frozen=lambda model: (model.glance, model.focus, model.head),
        ),
        "glance_staged": Recipe(
            partial(with_places, LearnedCrops()), every_glimpse, start="glance_drawn", epochs=2,
            optimizer=sgd(0.02, weight_decay=5e-4), frozen=lambda model: (model.policy,),
        ),
    }  # fmt: skip
    for name in ("glance_steered", "glance_staged"):
        for share in SHARES:
            found[f"{name}-{share}"] = Recipe(partial(with_exits, held_out, share), None, start=name)
    return found


if __name__ == "__main__":
    args = arguments(__doc__.split("\n")[0], "cifar10_mechanisms", epochs=6)
    problem = Data("parquet", place=args.data, held_out=5000).open(batch=128, seed=args.seed)
    samples = torch.cat([x for (x, _), _ in zip(problem.test, range(2), strict=False)])
    Experiment(
        "cifar10_resolution", problem.title, STATIC, dynamic(problem.held_out), problem.train, problem.held_out,
        problem.test, samples, sgd(0.2, weight_decay=5e-4), "bf16-mixed",
    ).run(args)  # fmt: skip
