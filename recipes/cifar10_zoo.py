"""CIFAR-10: networks of the zoo that have gates, small, each beside static ones of its family (`beside.py`).

    python recipes/cifar10_zoo.py train skipnet moe_vit --data DIR     # names in `families`; all if none
    python recipes/cifar10_zoo.py measure --data DIR                   # all families whose static networks are there

Three families: ResNets of 14 layers (SkipNet, ConvNet-AIG, BlockDrop, FBS, CGNet), MobileNets (DS-Net), small vision
transformers (experts). Every network is the zoo's, with the stages of training that its paper has, cut short: see
`epochs` in the rows. DIR holds the parquet files of the Hugging Face hub's `cifar10`.
"""

from dataclasses import dataclass
from functools import partial

import torch
from beside import Experiment, Recipe, arguments
from cifar10_mechanisms import drop, thresholds

from dynanet import Budget, Gate, zoo
from dynanet.experiment import Data
from dynanet.gates.rules import Gumbel
from dynanet.mechanisms.channel_skip import SaliencyL1
from dynanet.mechanisms.slimmable import EnsembleBootstrapping, SandwichGate
from dynanet.nets.resnet import cifar_resnet
from dynanet.train import (
    BudgetPenalty,
    CrossEntropy,
    LoadBalance,
    Reinforce,
    RouterZ,
    SkipReward,
    TargetRate,
    adamw,
    sample_gates,
    sgd,
    tighten_budget,
)
from dynanet.zoo.aig_nets import target_rates
from dynanet.zoo.blockdrop_nets import load_static
from dynanet.zoo.ds_nets import slimmable_mobilenet

RESNET = {"num_classes": 10, "depth": 14, "widths": (16, 32, 64)}
MOBILENET = {"num_classes": 10, "depths": (1, 1, 1, 2, 1), "strides": (1, 1, 2, 2, 2, 1)}
VIT = {"num_classes": 10, "width": 48, "depth": 4, "heads": 3}
FINER, JOINTLY = sgd(0.05, weight_decay=5e-4), sgd(0.02, weight_decay=5e-4)


@dataclass
class Family:
    """Networks of one kind.

    Attributes:
        static: of several sizes.
        dynamic: compared with those.
        optimizer: of all whose recipe names no other.
        precision: as for Lightning's Trainer.
    """

    static: dict[str, Recipe]
    dynamic: dict[str, Recipe]
    optimizer: object
    precision: str = "bf16-mixed"


def plus(*terms):
    """Cross-entropy and more, without a schedule."""
    return lambda model, cost: (sum(terms, CrossEntropy()), ())


def rates(share):
    """ConvNet-AIG's loss: every gated layer runs for this share."""
    return lambda model, cost: (CrossEntropy() + 2.0 * TargetRate(target_rates(model, share)), ())


def skipnet_warm():
    """Its first stage, with gates that sample and a rate. Soft gates, as the paper has them, were tried: all of them stay
    above a half for every image, so that none is closed when they are cut there, and the second stage finds no other.
    """
    model = zoo.skipnet(**RESNET)
    for gate in model.modules():
        if isinstance(gate, Gate):
            gate.rule = Gumbel()
    return model


def ds_net_widths():
    """Its first stage: four widths that teach each other."""
    net = zoo.ds_net(early=(16, 16, 32, 64), middle=(32, 64, 96, 128), late=(64, 128, 192, 256), **MOBILENET)
    net[1].between = 2
    net[1].bootstrap()
    return net


def ds_net_gate(trained):
    """Its second stage: nothing but the gate learns."""
    trained[1].between = trained[1].target = None
    return trained


def budgeted(share):
    """Who needs width, the answer's cross-entropy, and a budget of the widest network's MACs."""

    def objective(model, cost):
        budget = BudgetPenalty(Budget(macs=share * cost.full), cost)
        return SandwichGate(balanced=True) + CrossEntropy() + 4.0 * budget, (tighten_budget(budget),)

    return objective


def mobilenet(ratio):
    """One width of the same network, by itself."""
    channels = tuple(round(c * ratio) for c in (16, 16, 32, 64, 128, 256))
    return slimmable_mobilenet(ratios=(1.0,), channels=channels, **MOBILENET).at(0)


def scaled(widths, ratio):
    return {**RESNET, "widths": tuple(round(width * ratio) for width in widths)}


def families():
    """By name."""
    skipping = {
        "skipnet_warm": Recipe(skipnet_warm, plus(2.0 * TargetRate(0.7)), epochs=2),
        "skipnet": Recipe(
            sample_gates, plus(Reinforce(SkipReward(0.5))), start="skipnet_warm", epochs=2, optimizer=JOINTLY
        ),
        "convnet_aig": Recipe(partial(zoo.convnet_aig_cifar, always=(0, 2, 4), **RESNET), rates(0.6)),
        "blockdrop_policy": Recipe(
            lambda static: load_static(zoo.blockdrop(**RESNET), static), drop(), start="resnet-1.0", epochs=1,
            optimizer=adamw(1e-3), frozen=lambda model: (model.before, *model.blocks, model.after),
        ),
        "blockdrop": Recipe(
            lambda policy: policy, drop(CrossEntropy()), start="blockdrop_policy", epochs=2, optimizer=JOINTLY
        ),
        "fbs_resnet": Recipe(partial(zoo.fbs_resnet, **RESNET), plus(1e-8 * SaliencyL1())),
        "cgnet": Recipe(
            partial(zoo.cgnet, num_classes=10, widths=(16, 32, 64), depths=(2, 2, 2), tile=4), thresholds(0.4)
        ),
    }  # fmt: skip
    return {
        "cifar10_resnets": Family(
            {f"resnet-{r}": Recipe(partial(cifar_resnet, **scaled(RESNET["widths"], r))) for r in (0.5, 0.75, 1.0)},
            skipping, sgd(0.1, weight_decay=5e-4),
        ),
        "cifar10_mobilenets": Family(
            {f"mobilenet-{ratio}": Recipe(partial(mobilenet, ratio)) for ratio in (0.5, 0.75, 1.0)},
            {
                "ds_net_widths": Recipe(ds_net_widths, lambda model, cost: (EnsembleBootstrapping(), ())),
                "ds_net": Recipe(
                    ds_net_gate, budgeted(0.6), start="ds_net_widths", epochs=1, optimizer=adamw(1e-3),
                    frozen=lambda model: (model[0], model[1].net),
                ),
            },
            FINER,
        ),
        "cifar10_vits": Family(
            {f"vit-{hidden}": Recipe(partial(zoo.moe_vit, experts=0, hidden=hidden, **VIT)) for hidden in (24, 96, 384)},
            {"moe_vit": Recipe(partial(zoo.moe_vit, hidden=96, **VIT), plus(0.01 * LoadBalance(), 0.001 * RouterZ()))},
            adamw(1e-3, weight_decay=0.05), "32-true",
        ),
    }  # fmt: skip


if __name__ == "__main__":
    args = arguments(__doc__.split("\n")[0], "cifar10_zoo", epochs=4)
    problem = Data("parquet", place=args.data, held_out=5000).open(batch=128, seed=args.seed)
    samples = torch.cat([x for (x, _), _ in zip(problem.test, range(2), strict=False)])
    asked = args.names
    for name, family in families().items():
        args.names = [each for each in asked if each in family.static | family.dynamic]
        experiment = Experiment(
            name, problem.title, family.static, family.dynamic, problem.train, problem.held_out, problem.test, samples,
            family.optimizer, family.precision,
        )  # fmt: skip
        there = all(experiment.there(each, args) for each in family.static)
        if (args.names or not asked) and (there or args.what == "train"):
            experiment.run(args)
