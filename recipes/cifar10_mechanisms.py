"""CIFAR-10: one network made dynamic in many ways, each beside the static networks of the same recipe (`beside.py`).

    python recipes/cifar10_mechanisms.py train layer_skip --data DIR      # a name of DYNAMIC, or several; all if none
    python recipes/cifar10_mechanisms.py measure --data DIR

A small ResNet (stem stride 2) is trained as it is, at smaller widths, and with each mechanism; same images, epochs,
optimiser and seed. DIR holds the parquet files of the Hugging Face hub's `cifar10`.
"""

from functools import partial

import torch
from beside import Experiment, Recipe, arguments
from torch import nn

from dynanet import Budget, CostModel, Gate, convert, zoo
from dynanet.experiment import Data, open_problem
from dynanet.gates.recurrent import RecurrentGate
from dynanet.gates.rules import Gumbel
from dynanet.gates.scorers import PooledScorer
from dynanet.mechanisms.channel_skip import ChannelSkip, SaliencyL1, fbs_gate
from dynanet.mechanisms.layer_skip import BranchSkip, RecurrentSkip
from dynanet.mechanisms.path_select import PathSelect, PickPaths
from dynanet.mechanisms.policy_skip import PolicySkip
from dynanet.mechanisms.pondering import PonderLoss, PonderNet
from dynanet.train import CrossEntropy, TargetRate, Within, sgd, tighten_budget

WIDTHS, DEPTHS = (24, 48, 96), (2, 2, 2)


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
DYNAMIC = {
    "layer_skip": Recipe(layer_skip, within(0.5)),
    "layer_skip_rates": Recipe(layer_skip, lambda cost: (CrossEntropy() + 2.0 * TargetRate(0.5), ())),
    "recurrent_skip": Recipe(recurrent_skip, within(0.5)),
    "policy_skip": Recipe(policy_skip, within(0.5)),
    "path_select": Recipe(path_select, within(0.5)),
    "channel_skip": Recipe(channel_skip, lambda cost: (CrossEntropy() + 1e-8 * SaliencyL1(), ())),
    "pondernet": Recipe(pondernet, lambda cost: (PonderLoss(prior=0.4), ())),
}


if __name__ == "__main__":
    args = arguments(__doc__.split("\n")[0], "cifar10_mechanisms", epochs=6)
    problem = open_problem(Data("parquet", place=args.data, held_out=5000), batch=128, seed=args.seed)
    samples = torch.cat([x for (x, _), _ in zip(problem.test, range(2), strict=False)])
    Experiment(
        "cifar10_mechanisms", problem.title, STATIC, DYNAMIC, problem.train, problem.held_out, problem.test, samples,
        sgd(0.2, weight_decay=5e-4), "bf16-mixed",
    ).run(args)  # fmt: skip
