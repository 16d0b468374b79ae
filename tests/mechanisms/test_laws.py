"""Every mechanism is held to the laws here: one line in LAYERS."""

import zlib

import pytest
import torch
from torch import nn

from dynanet.core.gate import Gate
from dynanet.data.ragged import Sequences
from dynanet.gates.confidence import LearnedGate, LearnedScore, Patience, PerExit
from dynanet.gates.expert_rules import BiasedTopK
from dynanet.gates.recurrent import RecurrentGate
from dynanet.gates.rules import Gumbel, RelaxedTopK, Sigmoid, StraightThrough, Threshold, TopK
from dynanet.gates.scorers import ContextScorer, PooledScorer, TileScorer
from dynanet.mechanisms.cascade import Cascade
from dynanet.mechanisms.channel_gating import ChannelGating
from dynanet.mechanisms.channel_skip import ChannelSkip, fbs_gate
from dynanet.mechanisms.clip_sampling import ClipSampling
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.early_stop import EarlyStop
from dynanet.mechanisms.experts import Experts, RouterScorer, sigmoid_over_kept, softmax_over_kept
from dynanet.mechanisms.frame_exit import ExitGate, FrameExit
from dynanet.mechanisms.frame_select import FrameSelect
from dynanet.mechanisms.glance_focus import GlanceFocus, JoinedHead, PlacePolicy, RecurrentHead
from dynanet.mechanisms.jump import Jump
from dynanet.mechanisms.layer_skip import BranchSkip, LayerSkip, RecurrentSkip
from dynanet.mechanisms.mixture_of_depths import MixtureOfDepths, causal_predictor
from dynanet.mechanisms.neuron_skip import LowRankScorer, NeuronSkip
from dynanet.mechanisms.path_select import PathSelect, by_score, summed
from dynanet.mechanisms.pixel_cascade import PixelCascade
from dynanet.mechanisms.point_refine import PointRefine
from dynanet.mechanisms.policy_skip import PolicySkip
from dynanet.mechanisms.pondering import ACT, PonderNet
from dynanet.mechanisms.position_halting import PositionHalting
from dynanet.mechanisms.resolution_select import ResolutionSelect
from dynanet.mechanisms.scene_exit import SceneExit
from dynanet.mechanisms.skim import Skim
from dynanet.mechanisms.slimmable import DoubleHead, Slimmable
from dynanet.mechanisms.soft_tree import SoftTree, expected
from dynanet.mechanisms.spatial_skip import SpatialSkip
from dynanet.mechanisms.token_drop import ClassAttention, RankScorer, TokenDrop, TokenPredictor
from dynanet.mechanisms.token_halting import TokenHalting
from dynanet.mechanisms.token_merge import TokenMerge
from dynanet.mechanisms.update_skip import UpdateSkip
from dynanet.nets.slim import SlimBatchNorm2d, SlimConv2d, SlimResidual, SlimSequential
from dynanet.nets.spatial_transformer import Resize
from dynanet.ops.tiles import Tiles
from dynanet.ops.tokens import Tokens, attend, attend_causal, class_attention, summed_key
from dynanet.testing import check_dynamic, check_nested

D, C = 12, 8


def mlp():
    return nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))


def row_gate(rule=None):
    return Gate(nn.Linear(D, 1), rule or StraightThrough())


def conv(kernel, inside=C, outside=C, dilation=1):
    return nn.Conv2d(inside, outside, kernel, padding=dilation * (kernel // 2), dilation=dilation)


def warm(model):
    """Batch norms as after training: a constant input no longer stays constant, biases leak where masks are wrong."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            m.bias.data.normal_()
    return model


def bottleneck():
    return nn.Sequential(
        conv(1, C, 4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        conv(3, 4, 4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        conv(1, 4, C),
        nn.BatchNorm2d(C),
    )


def cell():
    return nn.Sequential(nn.ReLU(), conv(3), nn.ReLU(), conv(3))


def early_exit(wrap, confidence=None, threshold=-1.3):
    model = EarlyExit([wrap(mlp()) for _ in range(4)], [nn.Linear(D, 5) for _ in range(4)], confidence)
    model.thresholds.fill_(threshold)
    return model


def learned_exits(wrap):
    """Another gate at every exit, so that each has to know which exit it speaks of."""
    model = early_exit(wrap, PerExit([LearnedGate(), LearnedScore(5), LearnedScore(5)]), threshold=-0.5)
    for linear in (gate.linear for gate in model.confidence.exits):
        nn.init.normal_(linear.weight, std=0.5)
    return model


def exits_off(wrap):
    model = early_exit(wrap, Patience(), threshold=1.0)
    model.active = (0, 2, 3)
    return model


def cascade(wrap, ensemble="none"):
    networks = [nn.Sequential(nn.Linear(D, n), nn.ReLU(), nn.Linear(n, D)) for n in (4, 16, 32)]
    model = Cascade([nn.Sequential(wrap(n), nn.Linear(D, 5)) for n in networks], ensemble=ensemble)
    model.thresholds.fill_(-1.2)
    return model


def residual(wrap):
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(conv(3), nn.BatchNorm2d(C), nn.ReLU(), conv(3), nn.BatchNorm2d(C))

        def forward(self, x):
            return (x + self.branch(x)).relu()

    return Residual()


def layer_skip_image(wrap):
    return warm(LayerSkip(residual(wrap), Gate(PooledScorer(C, hidden=4, bias=0.0), Gumbel())))


def shared_cell(wrap):
    """One layer called three times: a trace hears it three times."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = LayerSkip(wrap(mlp()), row_gate())

        def forward(self, x):
            for _ in range(3):
                x = torch.tanh(self.cell(x))
            return x

    return Shared()


class Block(nn.Module):
    """A pre-norm transformer block on Tokens; the feed-forward part may be any layer from rows to rows."""

    def __init__(self, feed_forward) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out, self.feed_forward = nn.Linear(D, 3 * D), nn.Linear(D, D), feed_forward

    def forward(self, tokens):
        attended = attend(*self.qkv(self.norm1(tokens.x)).chunk(3, -1), tokens, heads=2)
        x = tokens.x + self.out(attended)
        return tokens._replace(x=x + self.feed_forward(self.norm2(x)))


class SmallViT(nn.Module):
    def __init__(self, *body) -> None:
        super().__init__()
        self.cls, self.body, self.head = nn.Parameter(torch.randn(1, 1, D)), nn.Sequential(*body), nn.Linear(D, 4)

    def forward(self, x_BTD):
        x = torch.cat([self.cls.expand(x_BTD.shape[0], -1, -1), x_BTD], 1)
        return self.head(self.body(Tokens(x)).x[:, 0])


def drop_twice(wrap):
    inner = TokenDrop(nn.Sequential(Block(wrap(mlp())), Block(mlp())), row_gate())
    return SmallViT(Block(mlp()), TokenDrop(nn.Sequential(Block(wrap(mlp())), inner), row_gate()))


class Telling(Block):
    """Tells what is attended to and what is alike."""

    def forward(self, tokens):
        query, key, _ = self.qkv(self.norm1(tokens.x)).chunk(3, -1)
        attention, key = class_attention(query, key, tokens, 2), summed_key(key, 2)
        return super().forward(tokens)._replace(attention=attention, key=key)


def predicted_drop(wrap):
    """As many as the predictor says; inside, as many are merged as are alike."""
    merge = TokenMerge(nn.Sequential(Block(wrap(mlp())), Block(mlp())), similarity=0.0)
    gate = Gate(TokenPredictor(D, bias=0.0), Gumbel())
    return SmallViT(Block(mlp()), TokenDrop(nn.Sequential(Telling(wrap(mlp())), merge), gate))


def fused_drop(wrap):
    def drop(*rest):
        return TokenDrop(nn.Sequential(*rest), Gate(RankScorer(ClassAttention()), Threshold(0.4)), fuse=True)

    return SmallViT(Telling(mlp()), drop(Telling(wrap(mlp())), drop(Block(wrap(mlp())), Block(mlp()))))


def token_merge(wrap):
    inner = TokenMerge(nn.Sequential(Block(wrap(mlp())), Block(mlp())), merge=2)
    return SmallViT(Telling(mlp()), TokenMerge(nn.Sequential(Telling(wrap(mlp())), inner), merge=3))


def point_refine(wrap):
    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(C, 6, 3, 2, 1), nn.Conv2d(6, 4, 3, 2, 1)

        def forward(self, x):
            fine = self.fine(x).relu()
            return fine, self.coarse(fine)

    head = nn.Sequential(nn.Linear(6 + 4, D), nn.ReLU(), wrap(mlp()), nn.Linear(D, 4))
    model = PointRefine(Coarse(), head, points=30)
    model.threshold.fill_(0.4)
    return model


class CausalBlock(Block):
    """The same without looking ahead."""

    def forward(self, tokens):
        attended = attend_causal(*self.qkv(self.norm1(tokens.x)).chunk(3, -1), tokens, heads=2)
        x = tokens.x + self.out(attended)
        return tokens._replace(x=x + self.feed_forward(self.norm2(x)))


def mixture_of_depths(predictor):
    """Around one block, and around two of which the first is one again."""

    def one(block):
        return MixtureOfDepths(block, D, capacity=0.5, predictor=causal_predictor(D, 4) if predictor else None)

    def make(wrap):
        inner = one(CausalBlock(wrap(mlp())))
        return SmallViT(Block(mlp()), one(CausalBlock(wrap(mlp()))), one(nn.Sequential(inner, Block(mlp()))))

    return make


def channels(wrap):
    gates = [
        Gate(PooledScorer(C, 4, hidden=0, bias=0.0), rule, units=4) for rule in (Threshold(), TopK(2), Threshold())
    ]
    return ChannelSkip([conv(3), conv(3), nn.Conv2d(C, 2 * C, 3, stride=2)], gates, groups=4)


def boosted_channels(wrap):
    """FBS: saliencies, batch norms, pooling, a first convolution without groups, a stride, single channels."""
    convs = [nn.Conv2d(C, 12, 3, bias=False), nn.Conv2d(12, 8, 1), nn.Conv2d(8, C, 3, stride=2, padding=1, bias=False)]
    norms = [nn.BatchNorm2d(12), None, nn.BatchNorm2d(C)]
    afters = [nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, 1)), nn.ReLU(), nn.Identity()]
    groups = (3, 2, C)
    gates = [fbs_gate(c.in_channels, g, 0.5) for c, g in zip(convs, groups, strict=True)]
    return warm(ChannelSkip(convs, gates, groups, norms=norms, afters=afters, boost=True))


def gated_channels(groups=1, tiles=None, **options):
    return lambda wrap: warm(ChannelGating(nn.Conv2d(C, 6, 3, **options), 2, groups=groups, tiles=tiles, threshold=0.0))


def widths(wrap):
    """Features at three widths; the last layer has the same channels at each."""
    slim = (4, 6, 9)
    net = SlimSequential(
        SlimConv2d((C, C, C), slim, 3, 2), SlimBatchNorm2d(slim), nn.ReLU(),
        SlimConv2d(slim, slim, 3, depthwise=True), SlimBatchNorm2d(slim), SlimConv2d(slim, (C, C, C), 1),
    )  # fmt: skip
    return warm(
        Slimmable(net, Gate(PooledScorer(C, 3, hidden=4, bias=0.0), RelaxedTopK(noise=True, hard=True), units=3))
    )


def double_head(wrap):
    """A residual block at two widths; the gate attends to channels too."""
    slim, same = (4, 9), (C, C)
    branch = SlimSequential(SlimConv2d(same, slim, 3), SlimBatchNorm2d(slim), nn.ReLU(), SlimConv2d(slim, same, 3))
    heads = DoubleHead(C, 2)
    nn.init.normal_(heads.attention.weight)
    return warm(
        Slimmable(SlimSequential(SlimResidual(branch)), Gate(heads, RelaxedTopK(noise=True, hard=True), units=2))
    )


def images(height, width, batch=5):
    return torch.randn(batch, C, height, width)


def spatial(height, width, tile, halo=1, branch=None):
    return (
        lambda wrap: warm(
            SpatialSkip((branch or bottleneck)(), Gate(TileScorer(C, tile), StraightThrough()), Tiles(tile, halo))
        ),
        images(height, width),
    )


def glances(head=RecurrentHead, hidden=7):
    """A glance and two crops, of images that are smaller than a crop in one direction."""

    def encoder(wrap):
        return nn.Sequential(nn.Conv2d(C, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), wrap(conv(3, 6, 6)))

    def make(wrap):
        parts = encoder(wrap), encoder(wrap), PlacePolicy(6, width=3, hidden=5, grid=2), head(6, hidden, 5)
        model = warm(GlanceFocus(*parts, glance_size=6, crop_size=(5, 8), glimpses=3))
        model.thresholds.fill_(-1.0)
        return model

    return make


def sizes(wrap):
    """A network at three sizes, one of them larger than the image."""
    net = nn.Sequential(
        nn.Conv2d(C, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), wrap(conv(3, 6, 6)), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    look = nn.Sequential(Resize(4), conv(3, C, 4), nn.ReLU(), PooledScorer(4, 3, 4, bias=0.0))
    return warm(ResolutionSelect(net, [4, (7, 5), 12], Gate(look, RelaxedTopK(noise=True, hard=True), units=3)))


class OfPatches(nn.Module):
    """Flattens a patch, so that units from rows to rows fit behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(C * 9, D)

    def forward(self, x):
        return self.map(x.flatten(1)).relu()


def scene_exit(wrap):
    rest = EarlyExit([nn.Sequential(OfPatches(), wrap(mlp())), wrap(mlp())], [nn.Linear(D, 3), nn.Linear(D, 3)])
    rest.thresholds.fill_(0.1)
    return SceneExit(nn.Sequential(conv(1), nn.ReLU()), nn.Linear(C, 3), rest, patch=3, threshold=0.0)


def dynconv(tile, halo, branch):
    """DynConv's mask unit over a branch whose convolutions run on the dilated mask."""
    return lambda wrap: warm(
        SpatialSkip(branch(), Gate(ContextScorer(C, tile, bias=0.0), Gumbel()), Tiles(tile, halo), dilate=True)
    )


def pixel_cascade(wrap):
    """A strided backbone, two later stages of which one cell starts with what reads no neighbours."""
    backbone = nn.Sequential(wrap(conv(3)), nn.ReLU(), nn.Conv2d(C, C, 3, stride=2, padding=1))
    exits = [conv(1, C, 4), nn.Sequential(conv(3), nn.ReLU(), conv(1, C, 4)), conv(1, C, 4)]
    model = warm(PixelCascade(backbone, [[cell()], [nn.Sequential(bottleneck(), nn.Tanh()), conv(3)]], exits))
    model.thresholds.fill_(-0.7)
    return model


def sact(tile, *, dilate, first=None):
    """Halting scores with a local part that runs only where a position goes on."""

    def make(wrap):
        cells = [nn.Sequential(bottleneck(), nn.Tanh()) for _ in range(3)]
        heads = [ContextScorer(C, tile, bias=-0.5, norm=True) for _ in range(2 if first is None else 3)]
        start = None if first is None else first()
        return warm(PositionHalting(cells, heads, Tiles(tile, 1), first=start, residual=True, dilate=dilate))

    return make


def rows_to_rows(wrap):
    return LayerSkip(wrap(mlp()), row_gate())


def branch_skip(wrap):
    """The branch changes the shape, the shortcut is a convolution."""
    branch = nn.Sequential(wrap(conv(3)), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, 6, 3, stride=2, padding=1))
    gate = Gate(PooledScorer(C, hidden=4, bias=0.0), Gumbel())
    return warm(BranchSkip(branch, gate, nn.Conv2d(C, 6, 1, stride=2), nn.ReLU()))


def recurrent_skip(wrap):
    return RecurrentSkip([wrap(mlp()) for _ in range(3)], RecurrentGate([D] * 3, StraightThrough(), hidden=4, bias=0.0))


def policy_skip(wrap):
    policy = Gate(nn.Linear(D, 3), StraightThrough(), units=3)
    shortcuts = [nn.Identity(), nn.Tanh(), nn.Identity()]
    return PolicySkip(policy, [wrap(mlp()) for _ in range(3)], shortcuts, before=nn.Linear(D, D), after=nn.Linear(D, 4))


def act(wrap, bias=-0.5):
    heads = [nn.Linear(D, 1) for _ in range(3)]
    for head in heads:
        nn.init.constant_(head.bias, bias)
    return ACT([wrap(mlp()) for _ in range(4)], heads)


def act_image(wrap):
    return warm(ACT([residual(wrap) for _ in range(3)], [PooledScorer(C, hidden=0, bias=0.4) for _ in range(2)], 0.3))


def ponder_net(wrap):
    return PonderNet([wrap(mlp()) for _ in range(4)], [nn.Linear(D, 5)] * 4, [nn.Linear(D, 1) for _ in range(3)], 0.6)


def paths(wrap, rule, **settings):
    """Three branches of three prices."""
    branches = [wrap(nn.Linear(D, D)), wrap(mlp()), nn.Sequential(mlp(), wrap(mlp()))]
    return PathSelect(branches, Gate(nn.Linear(D, 3), rule, units=3), **settings)


def image_paths(wrap):
    """Branches that change the shape, any number of them; a strided shortcut where none runs."""
    branches = [nn.Sequential(wrap(conv(k)), nn.ReLU(), nn.Conv2d(C, 6, 1, stride=2)) for k in (1, 3, 5)]
    gate = Gate(PooledScorer(C, units=3, hidden=4, bias=0.0), Gumbel(), units=3)
    return PathSelect(branches, gate, mix=summed, otherwise=nn.Conv2d(C, 6, 1, stride=2))


def tree(wrap):
    """A leaf at depth 1, two at 2, transformers before both decisions. All paths differ in price."""
    inner = SoftTree(row_gate(Gumbel()), nn.Linear(D, D), wrap(mlp()), before=wrap(nn.Linear(D, D)), mix=expected)
    return SoftTree(row_gate(Sigmoid()), wrap(mlp()), inner, before=nn.Tanh(), mix=expected)


def early_stop(wrap, kind=nn.GRUCell, threshold=-0.8, **options):
    model = EarlyStop(kind(D, 6), nn.Linear(6, 4), D, 6, 7, **options)
    model.thresholds.fill_(threshold)
    return model


class OfLengths(nn.Module):
    """Cuts sequences (B, T, D) to lengths of their own; the layer inside sees how long each one is."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(Sequences(x, 1 + (x[:, :, 0] > 0)[:, 1:].sum(1)))


def jump_scorer(wrap):
    """Of a state of 6 features, with room for another layer inside."""
    return nn.Sequential(nn.Linear(6, D), wrap(mlp()), nn.Linear(D, 4))


class OfVideos(OfLengths):
    """The same for videos (B, T, channels, height, width)."""

    def forward(self, x):
        return self.layer(Sequences(x, 1 + (x[:, 1:, 0, 0, 0] > 0).sum(1)))


def frame_net(wrap, outputs, width=4):
    """From frames of two channels and any size."""
    return nn.Sequential(
        conv(3, 2, width), nn.BatchNorm2d(width), nn.ReLU(), wrap(conv(3, width, width)), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(width, outputs),
    )  # fmt: skip


def frame_select(wrap, skips, light=None):
    """Three sizes, one of them larger than the frames; scores that differ enough for all of it to happen."""
    look = nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Tanh())
    nets = [frame_net(wrap, 3, width) for width in (3, 4, 6)][light is not None :]
    model = FrameSelect(look, nets, (2, 3, (5, 6)), features=5, hidden=6, num_classes=3, skips=skips, light=light)
    nn.init.normal_(model.policy.gate.scorer.weight, std=5.0)
    return warm(model)


def frame_exit(wrap, steps=3, **options):
    gates = [ExitGate(5, widths=(6, 4), first=k == 0) for k in range(steps - 1)]
    for gate in gates:
        nn.init.normal_(gate.leave.weight, std=5.0)
    return warm(FrameExit(frame_net(wrap, 5), [nn.Linear(5, 3) for _ in range(steps)], gates, **options))


def differentiable_gates(model):
    """What law 5 asks for gradients, where it is no Gate; None for the Gates."""
    ponder = [head for m in model.modules() if isinstance(m, PonderNet) for head in m.halting]
    return [m.delta for m in model.modules() if isinstance(m, UpdateSkip)] or ponder or None


def neurons(rule, scorer=None):
    def make(wrap):
        gate = Gate(scorer() if scorer else LowRankScorer(D, 6, rank=4, bias=0.0), rule, units=6)
        return NeuronSkip(nn.Linear(D, 24), nn.Linear(24, D), gate, activation=nn.GELU(), block=4)

    return make


class OfTheMean(nn.Module):
    """One decision for all tokens of a sample."""

    def __init__(self, units) -> None:
        super().__init__()
        self.map = nn.Linear(D, units)

    def forward(self, x):
        return self.map(x.mean(1))


def experts(rule, scorer=None, unit=mlp, shared=None, **settings):
    def make(wrap):
        gate = Gate(scorer() if scorer else RouterScorer(D, 4), rule, units=4)
        return Experts([wrap(unit()) for _ in range(4)], gate, shared=shared and shared(), **settings)

    return make


LAYERS = {
    "neuron skip, samples": (neurons(StraightThrough()), torch.randn(7, D)),
    "neuron skip, tokens": (neurons(TopK(2)), torch.randn(4, 5, D)),
    "neuron skip, samples of tokens": (neurons(StraightThrough(), lambda: OfTheMean(6)), torch.randn(4, 9, D)),
    "experts, switch": (experts(TopK(1)), torch.randn(7, D)),
    "experts, two and a shared one": (
        experts(TopK(2), mix=softmax_over_kept, shared=mlp),
        torch.randn(4, 5, D),
    ),
    "experts, balanced by biases": (experts(BiasedTopK(2, 4), mix=sigmoid_over_kept), torch.randn(7, D)),
    "experts, any number": (experts(Gumbel()), torch.randn(7, D)),
    "experts, samples of tokens": (experts(TopK(2), lambda: OfTheMean(4)), torch.randn(5, 3, D)),
    "experts, images": (
        lambda wrap: Experts(
            [wrap(residual(wrap)) for _ in range(3)], Gate(PooledScorer(C, 3, bias=0.0), TopK(1), units=3)
        ),
        images(5, 6),
    ),
    "early exit": (early_exit, torch.randn(7, D)),
    "early exit, learned gates": (learned_exits, torch.randn(7, D)),
    "early exit, patience, an exit off": (exits_off, torch.randn(7, D)),
    "cascade": (cascade, torch.randn(7, D)),
    "cascade, mean logits": (lambda wrap: cascade(wrap, "logits"), torch.randn(7, D)),
    "cascade, mean probabilities": (lambda wrap: cascade(wrap, "probabilities"), torch.randn(7, D)),
    "layer skip, samples": (rows_to_rows, torch.randn(7, D)),
    "layer skip, tokens": (lambda wrap: LayerSkip(wrap(mlp()), row_gate(Sigmoid())), torch.randn(4, 5, D)),
    "layer skip, images": (layer_skip_image, images(6, 7)),
    "layer skip, shared cell": (shared_cell, torch.randn(7, D)),
    "branch skip, a shape that changes": (branch_skip, images(6, 7)),
    "recurrent skip": (recurrent_skip, torch.randn(7, D)),
    "policy skip": (policy_skip, torch.randn(7, D)),
    "ACT": (act, torch.randn(7, D)),
    "ACT, images": (act_image, images(5, 6)),
    "PonderNet": (ponder_net, torch.randn(7, D)),
    "skip in skip in skip": (
        lambda wrap: rows_to_rows(
            lambda u: nn.Sequential(u, rows_to_rows(lambda v: nn.Sequential(v, rows_to_rows(wrap))))
        ),
        torch.randn(9, D),
    ),
    "spatial skip, tile 4 of 13x9": spatial(13, 9, 4),
    "spatial skip, tile 8 of 3x5": spatial(3, 5, 8),
    "spatial skip, positions of 7x7": spatial(7, 7, 1),
    "spatial skip, two convolutions": spatial(9, 10, 4, 2, lambda: nn.Sequential(conv(3), nn.ReLU(), conv(3))),
    "spatial skip, dilated": spatial(9, 10, 3, 2, lambda: conv(3, dilation=2)),
    "spatial skip, dilated mask of positions": (dynconv(1, 1, bottleneck), images(5, 7, 3)),
    "spatial skip, dilated mask of tiles of 4": (dynconv(4, 1, bottleneck), images(9, 6, 3)),
    "spatial skip, dilated masks of a chain": (
        dynconv(2, 3, lambda: nn.Sequential(nn.ReLU(), conv(3), nn.ReLU(), conv(3, dilation=2), conv(1))),
        images(5, 7, 3),
    ),
    "pixel cascade": (pixel_cascade, images(9, 13, 3)),
    "position halting, positions": (
        lambda wrap: PositionHalting([cell() for _ in range(3)], TileScorer(C, 1), Tiles(1, 2), eps=0.3),
        images(5, 6, 3),
    ),
    "position halting, tiles": (
        lambda wrap: PositionHalting([cell() for _ in range(4)], TileScorer(C, 3), Tiles(3, 2), eps=0.3),
        images(7, 8, 3),
    ),
    "SACT, positions, dilated": (sact(1, dilate=True), images(5, 6, 3)),
    "SACT, tiles of 3, dilated": (sact(3, dilate=True), images(7, 8, 3)),
    "SACT, tiles of 3, halos, a strided first unit": (
        sact(3, dilate=False, first=lambda: nn.Conv2d(C, C, 3, stride=2, padding=1)),
        images(9, 14, 3),
    ),
    "token drop, ragged": (drop_twice, torch.randn(4, 9, D)),
    "token drop, predicted, and a merge inside": (predicted_drop, torch.randn(4, 9, D)),
    "token drop, fused": (fused_drop, torch.randn(4, 11, D)),
    "token halting": (
        lambda wrap: SmallViT(TokenHalting([Block(wrap(mlp())) for _ in range(4)], scale=1.5, shift=-0.5)),
        torch.randn(4, 7, D),
    ),
    "token merge": (token_merge, torch.randn(4, 10, D)),
    "point refinement": (point_refine, images(13, 10, 3)),
    "mixture of depths": (
        lambda wrap: SmallViT(
            Block(mlp()), TokenDrop(Block(wrap(mlp())), row_gate()), Block(mlp()), TokenDrop(Block(mlp()), row_gate())
        ),
        torch.randn(4, 7, D),
    ),
    "mixture of depths, top tokens": (mixture_of_depths(predictor=False), torch.randn(4, 7, D)),
    "mixture of depths, causal predictor": (mixture_of_depths(predictor=True), torch.randn(4, 7, D)),
    "channel skip, in x out": (channels, images(6, 6)),
    "channel skip, boosted": (boosted_channels, images(7, 6)),
    "channel gating, groups": (gated_channels(groups=3, stride=2), images(7, 6)),
    "channel gating, tiles": (gated_channels(tiles=Tiles(4, 1), padding=1), images(9, 6)),
    "channel gating, groups on tiles": (gated_channels(groups=2, tiles=Tiles(3, 1), padding=1), images(7, 6)),
    "slimmable widths": (widths, images(7, 6)),
    "slimmable widths, two heads": (double_head, images(5, 6)),
    "glance and focus": (glances(), images(11, 7, 3)),
    "glance and focus, joined": (glances(JoinedHead, 3), images(11, 7, 3)),
    "resolution select": (sizes, images(11, 7, 3)),
    "scene exit": (scene_exit, images(4, 5, 3)),
    "path select, one of three": (lambda wrap: paths(wrap, RelaxedTopK()), torch.randn(7, D)),
    "path select, two of three, tokens": (lambda wrap: paths(wrap, RelaxedTopK(2), mix=by_score), torch.randn(4, 5, D)),
    "path select, any number, images": (image_paths, images(6, 7)),
    "soft tree": (tree, torch.randn(9, D)),
    "early stop": (early_stop, torch.randn(5, 6, D)),
    "early stop, LSTM, lengths, two at a time": (
        lambda wrap: OfLengths(early_stop(wrap, nn.LSTMCell, every=2, confidence=Patience(), threshold=1.0)),
        torch.randn(5, 7, D),
    ),
    "early stop, policy": (
        lambda wrap: early_stop(wrap, threshold=0.1, policy=nn.Linear(6, 1)),
        torch.randn(5, 6, D),
    ),
    "frame select": (lambda wrap: frame_select(wrap, (1, 2, 4)), torch.randn(4, 5, 2, 4, 3)),
    "frame select, light head, lengths": (
        lambda wrap: OfVideos(frame_select(wrap, (1,), nn.Linear(6, 3))),
        torch.randn(4, 5, 2, 4, 3),
    ),
    "frame exit": (frame_exit, torch.randn(4, 3, 2, 4, 3)),
    "frame exit, lengths, more frames than steps": (
        lambda wrap: OfVideos(frame_exit(wrap, longest=6)),
        torch.randn(4, 5, 2, 4, 3),
    ),
    "clip sampling": (
        lambda wrap: OfVideos(ClipSampling(frame_net(nn.Sequential, 1), frame_net(wrap, 3), 2, 3)),
        torch.randn(4, 4, 2, 4, 3),
    ),
    "update skip": (lambda wrap: UpdateSkip(nn.GRUCell(D, 6), D, 6), torch.randn(5, 6, D)),
    "jump": (lambda wrap: Jump(nn.GRUCell(D, 6), D, 6, read=1, reach=4, jumps=5), torch.randn(5, 7, D)),
    "jump, LSTM, lengths, two at a time": (
        lambda wrap: OfLengths(Jump(nn.LSTMCell(D, 6), D, 6, read=2, reach=3, jumps=2, scorer=jump_scorer(wrap))),
        torch.randn(5, 9, D),
    ),
    "skim": (lambda wrap: Skim(nn.GRUCell(D, 6), nn.GRUCell(D + 4, 2), D, 6, 2), torch.randn(5, 6, D)),
    "skim, LSTM, lengths": (
        lambda wrap: OfLengths(Skim(nn.LSTMCell(D, 6), nn.LSTMCell(D + 4, 2), D, 6, 2, StraightThrough())),
        torch.randn(5, 6, D),
    ),
    "update skip, LSTM, lengths": (
        lambda wrap: OfLengths(UpdateSkip(nn.LSTMCell(D, 6), D, 6, every_step=True)),
        torch.randn(5, 6, D),
    ),
}


def drawn(name):
    """A case, its example drawn anew from a seed of its own: the same in every run, whatever ran before."""
    torch.manual_seed(zlib.crc32(name.encode()))
    make, example = LAYERS[name]
    return make, torch.randn_like(example)


@pytest.mark.parametrize("name", LAYERS)
def test_laws(name):
    make, example = drawn(name)
    model = make(lambda unit: unit)
    check_dynamic(model, example, gates=differentiable_gates(model))


@pytest.mark.parametrize("name", LAYERS)
def test_nested(name):
    check_nested(*drawn(name))
