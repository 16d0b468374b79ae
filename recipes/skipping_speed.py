"""What skipping is worth in milliseconds, mechanism by mechanism, at the sizes people use. Weights and inputs are random.

    python recipes/skipping_speed.py --repeats 3 --results results        # names of NETWORKS; all if none

Speed does not depend on what the answers mean, so nothing is trained here: the gates are real ones, with random weights, and
their thresholds are set so that every one keeps the same share of these inputs. Every repeat is a process of its own;
every row of every repeat is kept. One thread; columns are explained in `dynanet/bench/comparison.py`.
"""

import argparse
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from dynanet import Gate, execute, record, zoo
from dynanet.bench.comparison import compare
from dynanet.bench.machine import append_rows
from dynanet.gates.rules import Threshold, TopK
from dynanet.gates.scorers import PooledScorer
from dynanet.mechanisms.cascade import Cascade
from dynanet.mechanisms.channel_gating import ChannelGating
from dynanet.mechanisms.channel_skip import ChannelSkip
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.mechanisms.path_select import PathSelect
from dynanet.mechanisms.policy_skip import PolicySkip
from dynanet.mechanisms.slimmable import Slimmable, separate
from dynanet.mechanisms.token_drop import TokenDrop
from dynanet.nets.resnet import basic_block, head
from dynanet.nets.slim import SlimBatchNorm2d, SlimConv2d, SlimSequential, scaled


def scorer(channels, units=1):
    """One linear map of the means: what it returns differs from input to input."""
    return PooledScorer(channels, units, hidden=0, bias=0.0)


def layer_skip(keep, channels=64):
    """Four residual blocks behind a static one, each with a gate."""
    blocks = [LayerSkip(basic_block(channels, channels), Gate(scorer(channels), Threshold())) for _ in range(4)]
    return nn.Sequential(basic_block(channels, channels), *blocks, head(channels, 10))


def policy_skip(keep, channels=64):
    """The same blocks, decided on at once."""
    blocks = [basic_block(channels, channels) for _ in range(4)]
    policy = Gate(scorer(channels, 4), Threshold(), units=4)
    return PolicySkip(policy, blocks, before=basic_block(channels, channels), after=head(channels, 10))


def path_select(keep, channels=64):
    """Four times a residual block or a 1x1 convolution: the block where its score is the higher one."""

    def two_ways():
        cheap = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        return PathSelect([cheap, basic_block(channels, channels)], Gate(scorer(channels, 2), TopK(1), units=2))

    return nn.Sequential(basic_block(channels, channels), *(two_ways() for _ in range(4)), head(channels, 10))


def widths(keep, channels=256):
    """Four convolutions that a gate runs at a quarter, a half, three quarters or all of their channels."""
    sizes = scaled(channels, (0.25, 0.5, 0.75, 1.0))
    layers = []
    for i in range(4):
        inputs = (channels,) * 4 if i == 0 else sizes
        outputs = (channels,) * 4 if i == 3 else sizes
        layers += [SlimConv2d(inputs, outputs, 3), SlimBatchNorm2d(outputs), nn.ReLU()]
    chain = Slimmable(SlimSequential(*layers), Gate(scorer(channels, 4), TopK(1), units=4))
    return separate(nn.Sequential(basic_block(channels, channels), chain, head(channels, 10)))


def channel_skip(keep, channels=256):
    """Two pairs of convolutions: of the first the best quarter, half or three quarters of four channel groups."""

    def pair():
        convs = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
        gates = [
            Gate(scorer(channels, 4), TopK(round(4 * keep)), units=4),
            Gate(scorer(channels, 1), Threshold(-1e9), units=1),
        ]
        norms = [nn.BatchNorm2d(channels) for _ in range(2)]
        return ChannelSkip(convs, gates, [4, 1], norms=norms)

    return nn.Sequential(basic_block(channels, channels), *(pair() for _ in range(2)), head(channels, 10))


def channel_gating(keep, channels=256):
    """Four convolutions of which a quarter of the inputs is always read, and the rest by half of the outputs' groups."""
    convs = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(4)]
    gated = [ChannelGating(conv, channels // 4, groups=4) for conv in convs]
    chain = [layer for gate in gated for layer in (gate, nn.ReLU())]
    return nn.Sequential(basic_block(channels, channels), *chain, head(channels, 10))


def cascade(keep, channels=64):
    """A network of half the channels and fewer blocks, and behind it the one of five blocks."""
    half = channels // 2
    begin = [nn.Conv2d(channels, half, 3, padding=1, bias=False), nn.BatchNorm2d(half), nn.ReLU()]
    small = nn.Sequential(*begin, basic_block(half, half), basic_block(half, half), head(half, 10))
    return Cascade([small, nn.Sequential(*(basic_block(channels, channels) for _ in range(5)), head(channels, 10))])


def token_drop(keep, channels=3):
    """A vision transformer of 196 tokens and six blocks; in front of the third and the fifth, tokens are dropped."""
    model = zoo.dynamic_vit(num_classes=10, size=112, patch=8, width=192, depth=6, heads=3, expansion=4, drops=(2, 4))
    for layer in drops(model):
        layer.gate.rule = Threshold()
    return model


NETWORKS = {  # what is built, the input's channels and side, and the shares that gates keep; None: an equal share each
    "layer_skip": (layer_skip, 64, 28, (0.25, 0.5, 0.75)),
    "policy_skip": (policy_skip, 64, 28, (0.5,)),
    "path_select": (path_select, 64, 28, (None,)),
    "widths": (widths, 256, 14, (None,)),
    "channel_skip": (channel_skip, 256, 14, (0.25, 0.5, 0.75)),
    "channel_gating": (channel_gating, 256, 14, (0.25, 0.5)),
    "cascade": (cascade, 64, 28, (0.25, 0.5)),
    "token_drop": (token_drop, 3, 112, (0.6,)),
}


def keeping(model, x, share):
    """Gates' last biases so that each keeps the share of these inputs, or each of its units an equal one."""
    model = execute(model.eval(), sparse=False)
    if isinstance(model, Cascade):
        with torch.no_grad():
            sure = model.confidence(model.networks[0](x))
        model.thresholds.fill_(float(sure.quantile(share)))
        return model
    for layer in drops(model):  # of the tokens that are still there: images differ in how many they keep
        with recorded(layer.gate.scorer) as scores, torch.no_grad():
            execute(model, sparse=True)(x)
        layer.gate.rule = Threshold(float(torch.cat(scores).flatten()[::7].quantile(1 - share)))
    execute(model, sparse=False)
    for layer in model.modules():
        if isinstance(layer, ChannelGating):
            with recorded(layer.gate.scorer) as scores, torch.no_grad():
                model(x)
                layer.gate.scorer.thresholds += scores[0].flatten(0, -2).quantile(1 - share, dim=0)
    gates = [m for m in model.modules() if isinstance(m, Gate) and isinstance(m.scorer, PooledScorer)]
    for gate in gates:  # in order: what one decides, the next one sees
        if isinstance(gate.rule, Threshold) and gate.rule.at < 0:
            continue  # keeps everything
        with recorded(gate.scorer) as scores, torch.no_grad(), record(model):
            model(x)
        score = torch.cat(scores)
        with torch.no_grad():
            if isinstance(gate.rule, TopK):
                gate.scorer.map.weight /= score.std(0)[:, None]  # so that none is always the best
                gate.scorer.map.bias.copy_(-(score - gate.scorer.map.bias).mean(0) / score.std(0))
            else:
                gate.scorer.map.bias -= score.quantile(1 - share, dim=0)
    return model


@contextmanager
def recorded(scorer):
    """Record what a scorer returns."""
    scores = []
    hook = scorer.register_forward_hook(lambda module, inputs, score: scores.append(score))
    try:
        yield scores
    finally:
        hook.remove()


def drops(model):
    """Where tokens are dropped."""
    return [layer for layer in model.modules() if isinstance(layer, TokenDrop)]


def full(name, channels):
    """What has no gate: the network to beat, where the model's own dense form computes several alternatives."""
    if name in ("path_select", "cascade"):
        return nn.Sequential(*(basic_block(channels, channels) for _ in range(5)), head(channels, 10))
    if name == "widths":
        convs = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(4))
        chain = [layer for conv in convs for layer in (conv, nn.BatchNorm2d(channels), nn.ReLU())]
        return nn.Sequential(basic_block(channels, channels), *chain, head(channels, 10))
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="of NETWORKS; all if none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_intermixed_args()
    names = args.names or list(NETWORKS)
    if args.repeats > 1:
        own = [sys.executable, __file__, *names, "--repeats", "1", "--rounds", str(args.rounds)]
        own += ["--results", str(args.results), "--batches", *map(str, args.batches)]
        for _ in range(args.repeats):
            subprocess.run(own, check=True)
        return
    torch.set_num_threads(1)
    for name in names:
        build, channels, side, shares = NETWORKS[name]
        for share in shares:
            torch.manual_seed(0)
            x = torch.randn(max(args.batches), channels, side, side) * 2 * torch.rand(max(args.batches), channels, 1, 1)
            model = keeping(build(share), x, share)
            rows = compare(model, x, batches=args.batches, rounds=args.rounds, full=full(name, channels), echo=print)
            about = {"network": name, "channels": channels, "side": side, "keep": share or "equal"}
            append_rows(args.results / "skipping_speed.csv", [asdict(row) for row in rows], about)


if __name__ == "__main__":
    main()
