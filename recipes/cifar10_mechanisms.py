"""CIFAR-10: one network made dynamic in many ways, each beside the static networks of the same recipe (`beside.py`).

    python recipes/cifar10_mechanisms.py train layer_skip --data DIR      # a name of DYNAMIC, or several; all if none
    python recipes/cifar10_mechanisms.py measure --data DIR

A small ResNet (stem stride 2) is trained as it is, at smaller widths, and with each mechanism; same images, epochs,
optimiser and seed. DIR holds the parquet files of the Hugging Face hub's `cifar10`.
"""

from functools import partial

import torch
from beside import Experiment, Recipe, arguments, cross_entropy
from torch import nn

from dynanet import Budget, CostModel, Gate, convert, zoo
from dynanet.experiment import Data
from dynanet.gates.recurrent import RecurrentGate
from dynanet.gates.rules import Bernoulli, Gumbel, RelaxedTopK, Sigmoid, StraightThrough
from dynanet.gates.scorers import ContextScorer, PooledScorer
from dynanet.mechanisms.channel_gating import ChannelGating, ThresholdTarget
from dynanet.mechanisms.channel_skip import ChannelSkip, SaliencyL1, fbs_gate
from dynanet.mechanisms.layer_skip import BranchSkip, RecurrentSkip
from dynanet.mechanisms.path_select import PathSelect
from dynanet.mechanisms.policy_skip import Bounded, PolicySkip, curriculum
from dynanet.mechanisms.pondering import ACT, PonderCost, PonderLoss, PonderNet
from dynanet.mechanisms.slimmable import DoubleHead, EnsembleBootstrapping, SandwichGate, Slimmable
from dynanet.mechanisms.soft_tree import LeafClassifier, RouteBalance, full_tree
from dynanet.mechanisms.spatial_skip import SpatialBudget, SpatialSkip, anneal_bounds
from dynanet.nets.condconv import CondConv2d
from dynanet.nets.dynamic_conv import DynamicConv2d
from dynanet.nets.dynamic_relu import DynamicReLU
from dynanet.nets.hypernetwork import HyperConv2d, KernelWriter, SampleCode
from dynanet.nets.slim import SlimBatchNorm2d, SlimConv2d, SlimLinear, SlimResidual, SlimSequential, scaled
from dynanet.nets.squeeze_excite import SqueezeExcite
from dynanet.ops.tiles import Tiles
from dynanet.train import (
    BudgetPenalty,
    CrossEntropy,
    DropReward,
    LoadBalance,
    Objective,
    Reinforce,
    SkipReward,
    TargetRate,
    adamw,
    anneal_temperature,
    deployed_reward,
    exponential,
    linear,
    sample_gates,
    sgd,
    surrogate,
    tighten_budget,
)

WIDTHS, DEPTHS = (24, 48, 96), (2, 2, 2)
SKIP_REWARD = 1.0  # what skipping every block is worth, in nats of cross-entropy (SkipNet's alpha)
DROP_PENALTY = 1.0  # of a wrong answer (BlockDrop's gamma)


def static(width=1.0):
    """The network without gates."""
    return zoo.static_resnet(num_classes=10, widths=WIDTHS, depths=DEPTHS, width_multiplier=width)


def within(share, weight=4.0):
    """Cross-entropy and a budget, a share of the static network's MACs, tightened over the first half of training."""

    def objective(model, cost):
        full = CostModel(static(), torch.zeros(1, 3, 32, 32)).full
        budget = BudgetPenalty(Budget(macs=share * full), cost)
        return CrossEntropy() + weight * budget, (tighten_budget(budget),)

    return objective


def layer_skip():
    """A gate at every block but the first, which holds the stem."""

    def gated(block):
        return BranchSkip(block.branch, Gate(PooledScorer(inputs(block)), Gumbel()), block.shortcut, nn.ReLU())

    return convert(static(), {"[1-5]": gated})


def normed(block):
    """A gate whose scores are normed over the training data, without noise: it tells images apart throughout."""
    gate = Gate(PooledScorer(inputs(block), bias=1.0, norm=True), StraightThrough())
    return BranchSkip(block.branch, gate, block.shortcut, nn.ReLU())


def layer_skip_normed():
    """Such a gate at every block but the first."""
    return convert(static(), {"[1-5]": normed})


def layer_skip_normed_rates():
    """Such a gate at those blocks that leave the shape as it is."""
    return convert(static(), {"[135]": normed})


def recurrent_skip():
    """The same blocks, one recurrent gate for all of them."""
    first, *blocks, exit_ = static()
    gate = RecurrentGate([inputs(block) for block in blocks], Gumbel())
    return nn.Sequential(first, RecurrentSkip(blocks, gate, [block.shortcut for block in blocks]), exit_)


def skipnet_warm(trained):
    """SkipNet's first stage: the trained network learns to live with gates that sample and have a gradient.

    Its feed-forward gates, with norms: without them images get scores so alike that sampling finds no difference.
    """

    def gated(block):
        gate = Gate(PooledScorer(inputs(block), norm=True), Gumbel())
        return BranchSkip(block.branch, gate, block.shortcut, nn.ReLU())

    return convert(trained, {"[1-5]": gated})


def policy_skip():
    """The same blocks; a small network looks at the image and decides on all of them at once."""
    first, *blocks, exit_ = static()
    policy = Gate(look(len(blocks)), Gumbel(), units=len(blocks))
    return PolicySkip(policy, blocks, [block.shortcut for block in blocks], before=first, after=exit_)


def look(blocks, *, norm=False):
    """From the image to a score per block: two convolutions with large strides."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 5, 4, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        PooledScorer(32, units=blocks, norm=norm),
    )


def blockdrop_policy(trained):
    """BlockDrop's first stage: the trained network stands still, a policy learns which of its blocks to drop."""
    first, *blocks, exit_ = trained
    policy = Gate(Bounded(look(len(blocks), norm=True)), Bernoulli(), units=len(blocks))
    return PolicySkip(policy, blocks, [block.shortcut for block in blocks], before=first, after=exit_)


def drop(*more, penalty=DROP_PENALTY):
    """REINFORCE against the reward of the policy cut at 1/2; with block after block if nothing else is learnt."""

    def objective(model, cost):
        reinforce = SelfCritical(model, DropReward(penalty))
        return sum(more, reinforce), () if more else (curriculum(model),)

    return objective


class SelfCritical(Objective):
    """REINFORCE whose baseline is what the policy would have earned as deployed: a second pass over the batch."""

    def __init__(self, model, reward) -> None:
        self.model, self.reward, self.x = model, reward, None
        model.register_forward_pre_hook(self._see)

    def _see(self, model, inputs):
        self.x = inputs[0]

    def __call__(self, answer, y, trace):
        """A scalar whose gradient is the point; 0 in validation."""
        if not self.model.training:
            return answer.new_zeros(())
        earned = self.reward(answer, y, trace)
        return surrogate(trace, earned - deployed_reward(self.model, self.x, y, self.reward))

    def __repr__(self) -> str:
        return f"SelfCritical({self.reward!r})"


def path_select(*, norm=False):
    """Every block but the first, or a 1x1 convolution in its place."""

    def two_ways(block):
        conv = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
        cheap = nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride, bias=False)
        cheap = nn.Sequential(cheap, nn.BatchNorm2d(conv.out_channels), nn.ReLU())
        scorer = PooledScorer(conv.in_channels, 2, bias=0.0, norm=norm)
        return PathSelect([cheap, block], Gate(scorer, RelaxedTopK(noise=not norm, hard=norm), units=2))

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


def channel_skip_normed():
    """The same; saliencies are normed over the training data, and compete softly in training, as paths do."""

    def gated(block):
        first, norm, _, second, last = block.branch
        gate = Gate(
            PooledScorer(first.in_channels, 4, hidden=0, bias=0.0, norm=True), RelaxedTopK(2, hard=True), units=4
        )
        gates, afters = [gate, fbs_gate(second.in_channels, 1, 1.0)], [nn.ReLU(), nn.Identity()]
        block.branch = ChannelSkip([first, second], gates, [4, 1], norms=[norm, last], afters=afters)
        return block

    return convert(static(), {"[1-5]": gated})


def channel_gating(tiles=None):
    """In every block but the first, convolutions read a quarter of the channels, and then the others where it pays: for
    an image, or with `tiles` for parts of it, where a convolution does not stride.
    """

    def gated(block):
        first, _, _, second, _ = block.branch
        parts = [
            ChannelGating(conv, conv.in_channels // 4, tiles=tiles if conv.stride == (1, 1) else None)
            for conv in (first, second)
        ]
        block.branch = nn.Sequential(parts[0], nn.ReLU(), parts[1])
        return block

    return convert(static(), {"[1-5]": gated})


def spatial_skip():
    """Blocks that leave the shape as it is run where a mask unit says so: DynConv."""

    def masked(block):
        gate = Gate(ContextScorer(inputs(block)), Gumbel())
        return nn.Sequential(SpatialSkip(block.branch, gate, Tiles(1), dilate=True), nn.ReLU())

    return convert(static(), {"[135]": masked})


def bounded(share):
    """DynConv's loss: a share of the masked blocks' MACs, between bounds that widen over a third of training."""

    def objective(model, cost):
        budget = SpatialBudget(share, cost)
        return CrossEntropy() + 10.0 * budget, (anneal_bounds(budget),)

    return objective


def thresholds(target):
    """Cross-entropy, and thresholds drawn to a target: every convolution stays closed for about as many."""
    return lambda model, cost: (CrossEntropy() + 0.5 * ThresholdTarget(target), ())


def slimmable_widths():
    """The first two blocks, then the others at four widths, trained by the sandwich rule with a moving average."""
    ratios = (0.25, 0.5, 0.75, 1.0)

    def normed(inputs, outputs, kernel, stride=1):
        return SlimSequential(SlimConv2d(inputs, outputs, kernel, stride), SlimBatchNorm2d(outputs))

    def block(inputs, outputs, stride):
        branch = SlimSequential(normed(inputs, outputs, 3, stride), nn.ReLU(), normed(outputs, outputs, 3))
        return SlimResidual(branch, normed(inputs, outputs, 1, stride) if stride > 1 else None)

    early, middle, late = (WIDTHS[0],) * len(ratios), scaled(WIDTHS[1], ratios), scaled(WIDTHS[2], ratios)
    blocks = [block(early, middle, 2), block(middle, middle, 1), block(middle, late, 2), block(late, late, 1)]
    net = SlimSequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), SlimLinear(late, 10))
    heads = DoubleHead(WIDTHS[0], len(ratios), hidden=16)
    slim = Slimmable(net, Gate(heads, RelaxedTopK(noise=True, hard=True), units=len(ratios)))
    slim.between = 2
    slim.bootstrap(0.99)
    return nn.Sequential(static()[:2], slim)


def slimmable(trained):
    """The same, with the gate's turn to learn."""
    trained[1].between = trained[1].target = None
    return trained


def gate_of_widths(share):
    """Who needs width, the answer's cross-entropy, and a budget."""

    def objective(model, cost):
        loss, schedules = within(share)(model, cost)
        return SandwichGate(balanced=True) + loss, schedules

    return objective


def pondernet():
    """Exits after every block, and a learnt probability to stop there."""
    staged = zoo.staged_resnet(num_classes=10, widths=WIDTHS, depths=DEPTHS)
    channels = [width for width, depth in zip(WIDTHS, DEPTHS, strict=True) for _ in range(depth)]
    return PonderNet(staged.stages, staged.exits, [PooledScorer(c, bias=-2.0) for c in channels[:-1]])


def act(*, norm=False):
    """A narrower network of twice the depth; the last three blocks of every stage are steps, and an image halts."""
    *blocks, exit_ = zoo.static_resnet(num_classes=10, widths=(16, 32, 64), depths=(4, 4, 4))
    stages = [blocks[i : i + 4] for i in range(0, 12, 4)]
    return nn.Sequential(
        *(
            nn.Sequential(first, ACT(cells, [PooledScorer(inputs(cell), bias=0.0, norm=norm) for cell in cells[1:]]))
            for first, *cells in stages
        ),
        exit_,
    )


def soft_tree():
    """Four leaves: a block on every edge, and a router that looks at what the edge answered."""

    def piece(*places):
        blocks = zoo.static_resnet(num_classes=10, widths=WIDTHS, depths=(1, 1, 1))
        return nn.Sequential(*(blocks[place] for place in places))

    edges = iter([0, 1, 1])  # the order in which full_tree grows: the root, its left child, its right child

    def router():
        width = WIDTHS[next(edges)]
        conv = nn.Conv2d(width, 16, 3, 2, 1, bias=False)
        return Gate(nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU(), PooledScorer(16, bias=0.0)), Sigmoid())

    return full_tree(2, router, leaf=lambda: LeafClassifier(piece(2, 3)), before=piece)


def harder(model, cost):
    """Likelihood of the mixture of leaves, both ways taken, and routers that get ever surer."""
    return CrossEntropy() + RouteBalance(0.1), (anneal_temperature(model, exponential(1.0, 0.1)),)


def with_parameters(build):
    """A little narrower than the full network; convolutions of the last two blocks get weights of the image's own."""

    def changed(conv):
        more = {"stride": conv.stride[0], "padding": conv.padding[0], "bias": False}
        return build(conv.in_channels, conv.out_channels, conv.kernel_size[0], more)

    return convert(static(0.85), {r"[45]\.branch\.[03]": changed})


PARAMETERS = {
    "condconv": lambda a, b, size, more: CondConv2d(a, b, size, experts=4, **more),
    "dynamic_conv": lambda a, b, size, more: DynamicConv2d(a, b, size, kernels=4, **more),
    "hypernetwork": lambda a, b, size, more: HyperConv2d(KernelWriter(16, a, b, size), SampleCode(a, 16), **more),
}


def squeeze_excite():
    """As narrow; what every block but the first adds is scaled channel by channel."""

    def scaled_(branch):
        channels = next(m for m in reversed(branch) if isinstance(m, nn.BatchNorm2d)).num_features
        return nn.Sequential(*branch, SqueezeExcite(channels))

    return convert(static(0.85), {r"[1-5]\.branch": scaled_})


def dynamic_relu():
    """As narrow; inside every block but the first, a ReLU whose pieces are the image's own."""

    def bent(branch):
        channels = next(m for m in branch if isinstance(m, nn.BatchNorm2d)).num_features
        return nn.Sequential(*(DynamicReLU(channels) if isinstance(m, nn.ReLU) else m for m in branch))

    return convert(static(0.85), {r"[1-5]\.branch": bent})


def cooling(model, cost):
    """Dynamic convolution: shares of kernels are nearly even at first (arXiv:1912.03458, sec. 4)."""
    return CrossEntropy(), (anneal_temperature(model, linear(30.0, 1.0, share=0.3)),)


def inputs(block):
    """Channels that a block takes."""
    return next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels


STATIC = {f"static-{width}": Recipe(partial(static, width)) for width in (0.5, 0.7, 0.85, 1.0)}
DYNAMIC = {
    "layer_skip": Recipe(layer_skip, within(0.5)),
    "layer_skip_rates": Recipe(layer_skip, lambda model, cost: (CrossEntropy() + 2.0 * TargetRate(0.5), ())),
    "layer_skip_normed": Recipe(layer_skip_normed, within(0.5)),
    "layer_skip_normed_rates": Recipe(
        layer_skip_normed_rates, lambda model, cost: (CrossEntropy() + 4.0 * TargetRate(0.5), ())
    ),
    "recurrent_skip": Recipe(recurrent_skip, within(0.5)),
    "policy_skip": Recipe(policy_skip, within(0.5)),
    "path_select": Recipe(path_select, within(0.5)),
    "path_select_balanced": Recipe(
        partial(path_select, norm=True), lambda model, cost: (CrossEntropy() + 0.1 * LoadBalance(), ())
    ),
    "skipnet_warm": Recipe(
        skipnet_warm, within(0.6), start="static-1.0", epochs=2, optimizer=sgd(0.05, weight_decay=5e-4),
    ),
    "skipnet": Recipe(
        sample_gates, lambda model, cost: (CrossEntropy() + Reinforce(SkipReward(SKIP_REWARD)), ()),
        start="skipnet_warm", epochs=4, optimizer=sgd(0.02, weight_decay=5e-4),
    ),
    "blockdrop_policy": Recipe(
        blockdrop_policy, drop(), start="static-1.0", epochs=3, optimizer=adamw(1e-3),
        frozen=lambda model: (model.before, *model.blocks, model.after),
    ),
    "blockdrop": Recipe(
        lambda policy: policy, drop(CrossEntropy()), start="blockdrop_policy", epochs=4,
        optimizer=sgd(0.02, weight_decay=5e-4),
    ),
    "act": Recipe(act, lambda model, cost: (CrossEntropy() + 0.005 * PonderCost(), ())),
    "act_normed": Recipe(partial(act, norm=True), lambda model, cost: (CrossEntropy() + 0.005 * PonderCost(), ())),
    "soft_tree": Recipe(soft_tree, harder),
    **{
        name: Recipe(partial(with_parameters, build), cooling if name == "dynamic_conv" else cross_entropy)
        for name, build in PARAMETERS.items()
    },
    "squeeze_excite": Recipe(squeeze_excite),
    "dynamic_relu": Recipe(dynamic_relu),
    "channel_skip": Recipe(channel_skip, lambda model, cost: (CrossEntropy() + 1e-8 * SaliencyL1(), ())),
    "channel_skip_normed": Recipe(
        channel_skip_normed, lambda model, cost: (CrossEntropy() + 0.02 * LoadBalance(), ())
    ),
    "channel_gating": Recipe(channel_gating, thresholds(0.4)),
    "channel_gating_tiles": Recipe(partial(channel_gating, Tiles(4, 1)), thresholds(0.4)),
    "spatial_skip": Recipe(spatial_skip, bounded(0.5)),
    "slimmable_widths": Recipe(slimmable_widths, lambda model, cost: (EnsembleBootstrapping(), ())),
    "slimmable": Recipe(
        slimmable, gate_of_widths(0.6), start="slimmable_widths", epochs=2, optimizer=adamw(1e-3),
        frozen=lambda model: (model[0], model[1].net),
    ),
    "pondernet": Recipe(pondernet, lambda model, cost: (PonderLoss(prior=0.4, beta=0.3), ())),
}  # fmt: skip


if __name__ == "__main__":
    args = arguments(__doc__.split("\n")[0], "cifar10_mechanisms", epochs=6)
    problem = Data("parquet", place=args.data, held_out=5000).open(batch=128, seed=args.seed)
    samples = torch.cat([x for (x, _), _ in zip(problem.test, range(2), strict=False)])
    Experiment(
        "cifar10_mechanisms", problem.title, STATIC, DYNAMIC, problem.train, problem.held_out, problem.test, samples,
        sgd(0.2, weight_decay=5e-4), "bf16-mixed",
    ).run(args)  # fmt: skip
