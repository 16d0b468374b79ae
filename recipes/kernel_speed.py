"""What the native kernels are worth: neuron blocks, experts and pixels. Weights and inputs are random.

    python recipes/kernel_speed.py --repeats 3 --results results     # all sets (`SETS`) if none is named

Every network is a few layers of one kind, run by one session call, so that layers find their weights cold where these
are larger than the cache. Gates are real ones; their cost is in the times and in the MACs. Answers are compared with the
dense form's before anything is timed. One thread; contestants are interleaved, figures are medians over rounds; every
repeat is a process of its own, and every row of it is kept.

Columns: `ms` per call of the session. `over_same_engine`: the session with everything kept over it. `over_best_dense`:
the quickest of torch (two layouts) and ONNX Runtime without skipping, named in `best_dense`. `macs_ratio`: MACs of the
dense form over those spent, gates included; `over_flop_ratio`: over_best_dense / macs_ratio, `same_over_flop_ratio` the
same of over_same_engine. `over_roofline`: the roofline's time over the session's: per layer, the larger of MACs over the
peak and bytes of weights touched over the bandwidth, both measured between the rounds (a product of 1,024 x 1,024
matrices in torch; a sum over 160 MB). `over_torch`: the session without native kernels, with its own choice of engines,
over the session with them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dynanet import CostModel, Gate, execute, forced, record
from dynanet.bench.comparison import dense_engines
from dynanet.bench.machine import append_rows
from dynanet.bench.timing import paired, ratio
from dynanet.core.decision import Decision
from dynanet.core.dynamic import everything
from dynanet.gates.rules import Threshold, TopK
from dynanet.gates.scorers import ContextScorer
from dynanet.mechanisms.experts import Experts, RouterScorer
from dynanet.mechanisms.neuron_skip import LowRankScorer, NeuronSkip
from dynanet.mechanisms.spatial_skip import SpatialSkip
from dynanet.ops.native import library
from dynanet.ops.tiles import Tiles
from dynanet.session import Session

KEEPS, BATCHES = (0.1, 0.25, 0.5), (1, 8, 64, 256)


def neurons(inputs, hidden, layers, batches):
    """Feed-forward layers whose weights no cache holds, blocks of 16 neurons, other blocks for every row."""
    for keep in KEEPS:
        torch.manual_seed(0)
        blocks = hidden // 16

        def layer(blocks=blocks, keep=keep):
            gate = Gate(LowRankScorer(inputs, blocks), TopK(round(keep * blocks)), units=blocks)
            return NeuronSkip(nn.Linear(inputs, hidden), nn.Linear(hidden, inputs), gate)

        model = nn.Sequential(*(layer() for _ in range(layers)))
        for batch in batches:
            yield f"neurons {inputs} x {hidden}, {layers} layers", keep, model, torch.randn(batch, inputs)


def experts(width, hidden, layers, several=8, k=2, batches=(1, 4, 16, 64, 256, 1024)):
    """Layers of 8 experts of which every token takes 2."""
    torch.manual_seed(0)

    def expert():
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def layer():
        return Experts([expert() for _ in range(several)], Gate(RouterScorer(width, several), TopK(k), units=several))

    model = nn.Sequential(*(layer() for _ in range(layers)))
    for tokens in batches:
        yield (
            f"experts {width} x {hidden}, {k} of {several}, {layers} layers",
            k / several,
            model,
            torch.randn(tokens, width),
        )


def three(channels):
    """A 3x3 convolution."""
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())


def bottleneck(channels):
    """1x1 to a quarter of the channels, 3x3, 1x1 back."""
    inside = channels // 4
    return nn.Sequential(
        nn.Conv2d(channels, inside, 1), nn.BatchNorm2d(inside), nn.ReLU(),
        nn.Conv2d(inside, inside, 3, padding=1), nn.BatchNorm2d(inside), nn.ReLU(),
        nn.Conv2d(inside, channels, 1), nn.BatchNorm2d(channels),
    )  # fmt: skip


def pixels(branch, channels, side, layers=2, tile=1, dilate=True):
    """Residual branches at the positions, or the tiles, that a mask unit keeps; images of smooth noise.

    The mask is dilated for what a branch reads around a position; without `dilate`, every tile brings a halo.
    """
    what = "pixels" if tile == 1 else f"tiles of {tile} x {tile}, {'dilated' if dilate else 'halos'}"
    for keep in KEEPS:
        torch.manual_seed(0)
        branches = [branch(channels) for _ in range(layers)]
        for batch in (1, 8):
            smooth = nn.functional.interpolate(
                torch.randn(batch, channels, side // 7, side // 7), side, mode="bilinear"
            )
            x = smooth + 0.1 * torch.randn(batch, channels, side, side)
            gates = [Gate(ContextScorer(channels, tile), Threshold()) for _ in branches]
            tiles = Tiles(tile, 1)  # both branches read one position beyond
            model = nn.Sequential(
                *(SpatialSkip(b, g, tiles, dilate=dilate) for b, g in zip(branches, gates, strict=True))
            ).eval()
            share(model, gates, x, keep)
            yield f"{what}, {branch.__name__}, {channels} channels of {side} x {side}, {layers} layers", keep, model, x


class MaskGiven(nn.Module):
    """A gate that ignores its input: one mask (1, H, W, 1) for all images."""

    def __init__(self, keep) -> None:
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, x):
        """As of a gate."""
        keep = self.keep.expand(x.shape[0], -1, -1, -1)
        return Decision(keep, keep)


@torch.no_grad()
def pixels_alone(branch, channels, side):
    """As `pixels`, but without mask units: the first image's masks are given, and x is laid out channels last."""
    for name, keep, model, x in pixels(branch, channels, side):
        share(model, [layer.gate for layer in model], x[:1], keep)
        with record(model) as trace:
            model(x[:1])
        for layer, name_of in zip(model, trace.keys(), strict=True):
            layer.gate = MaskGiven(trace[name_of][0][..., -1:])
        last = x.contiguous(memory_format=torch.channels_last)
        yield name.replace("pixels, ", "pixels, mask given, ", 1), keep, model, last


@torch.no_grad()
def share(model, gates, x, keep):
    """Thresholds one after the other, so that every gate keeps this share of these inputs."""
    for layer, gate in zip(model, gates, strict=True):
        gate.rule = Threshold(float(gate.scorer(x).flatten().quantile(1 - keep)))
        x = execute(layer, sparse=False)(x)


SETS = {
    "neurons": [lambda: neurons(1024, 8192, 3, BATCHES), lambda: neurons(2048, 8192, 2, BATCHES[:2])],
    "experts": [lambda: experts(512, 1024, 3), lambda: experts(768, 3072, 1, batches=(1, 4, 16, 64, 256))],
    "pixels": [
        lambda: pixels(three, 64, 56),
        lambda: pixels(three, 256, 14),
        lambda: pixels(bottleneck, 256, 56),
        lambda: pixels(bottleneck, 512, 28),
    ],
    "pixels_alone": [
        partial(pixels_alone, *network)
        for network in ((three, 64, 56), (three, 256, 14), (bottleneck, 256, 56), (bottleneck, 512, 28))
    ],
    "tiles": [
        partial(pixels, *network, tile=tile, dilate=dilate)
        for network in ((three, 64, 56), (bottleneck, 256, 56))
        for tile in (4, 14)
        for dilate in (True, False)
    ],
}


class Without:
    """A session made and run without native kernels."""

    def __init__(self, *arguments, **settings) -> None:
        with library.using(""):
            self.session = Session(*arguments, **settings)

    def __call__(self, x):
        """As of a session."""
        with library.using(""):
            return self.session(x)


def touched(layer, keep):
    """Bytes of weights that a layer reads for these decisions."""
    units = keep.flatten(0, -2).amax(0)
    if isinstance(layer, NeuronSkip):
        weights = layer.up.numel() + layer.down.numel()
    elif isinstance(layer, Experts):
        weights = sum(p.numel() for p in layer.experts.parameters())
    else:
        weights, units = sum(p.numel() for p in layer.branch.parameters()), units.amax(0, keepdim=True)
    return 4 * weights * float(units.mean())


def measured(name, keep, model, x, cache, rounds):
    """One row: the session against everything, interleaved."""
    model.eval()
    batch = len(x)
    settings = {"threads": 1, "batches": sorted({1, 4, batch}), "cache": cache}
    session, without = Session(model, x[:1], **settings), Without(model, x[:1], **settings)
    dense = dense_engines(model, x, cache)
    execute(model, sparse=False)
    if isinstance(model[0], NeuronSkip) and batch == 1:
        dense["torch mv"] = lambda inputs: by_vectors(model, inputs[0])
    # Every engine gets the memory format that suits it.
    given = {engine: x if engine == "eager channels_last" else x.contiguous() for engine in dense}
    with torch.no_grad(), forced(model, everything):
        expected = model(x)
        for engine, run in dense.items():
            torch.testing.assert_close(run([given[engine]])[0], expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad(), record(model) as kept:
        answer = model(x)
    for ours in (session, without.session):
        with library.using(library.instruction_set() if ours is session else ""), record(ours) as decided:
            same_answers(ours(x), answer, decided, kept)
    cost = CostModel(model, x[:1])
    spent = float(cost.spent(kept).sum())
    stream, square = torch.ones(40_000_000), torch.randn(1024, 1024)

    def all_kept():
        with forced(session, everything):
            session(x)

    calls = max(1, min(8, 64 // batch))
    contestants = {
        "session": lambda: [session(x) for _ in range(calls)],
        "without": lambda: [without(x) for _ in range(calls)],
        "same": lambda: [all_kept() for _ in range(calls)],
        "stream": lambda: stream.sum(),
        "square": lambda: square @ square,
        **{engine: lambda run=run, x=given[engine]: [run([x]) for _ in range(calls)] for engine, run in dense.items()},
    }
    with torch.no_grad():
        seconds = paired(contestants, rounds=rounds)
    ms = {who: 1e3 * float(np.median(s)) / calls for who, s in seconds.items()}
    best = min(dense, key=lambda engine: ms[engine])
    bandwidth, peak = 4 * stream.numel() / np.median(seconds["stream"]), 1024**3 / np.median(seconds["square"])
    decisions = [kept[layer][0] for layer in kept.keys()]
    per_layer = spent / len(model)
    roofline = sum(
        max(per_layer / peak, touched(layer, keeps) / bandwidth) for layer, keeps in zip(model, decisions, strict=True)
    )
    over_same, low, high = ratio(seconds["same"], seconds["session"])
    over_best = ratio(seconds[best], seconds["session"])[0]
    macs_ratio = batch * cost.full / spent
    return {
        "network": name, "keep": keep, "batch": batch, "native": library.instruction_set(), "rounds": rounds,
        "ms": ms["session"], "over_same_engine": over_same, "spread": f"{low:.2f}-{high:.2f}",
        "over_best_dense": over_best, "best_dense": best, "best_dense_ms": ms[best], "macs_ratio": macs_ratio,
        "over_flop_ratio": over_best / macs_ratio, "same_over_flop_ratio": over_same / macs_ratio,
        "over_roofline": 1e3 * roofline / ms["session"],
        "over_torch": ratio(seconds["without"], seconds["session"])[0],
        "gb_per_second": bandwidth / 1e9, "gmacs_per_second": peak / 1e9,
    }  # fmt: skip


def same_answers(ours, theirs, our_trace, their_trace):
    """Rows with the same decisions have the same answers, and nearly all have them: scores at a threshold may round."""
    same = torch.ones(len(ours), dtype=torch.bool)
    for name in their_trace.keys():
        for a, b in zip(our_trace[name], their_trace[name], strict=True):
            same &= (a == b).flatten(1).all(1)
    assert same.sum() >= 0.9 * len(ours) - 1, f"only {int(same.sum())} of {len(ours)} rows had the same decisions"
    torch.testing.assert_close(ours[same], theirs[same], rtol=1e-3, atol=1e-3)


def by_vectors(model, x):
    """One row through dense layers by products with a vector."""
    row = x[0]
    for layer in model:
        hidden = torch.mv(layer.up, row).add_(layer.up_bias).relu_()
        row = torch.mv(layer.down.t(), hidden).add_(layer.bias)
    return [row[None]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="*", help=", ".join(SETS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_intermixed_args()
    if unknown := set(args.sets) - SETS.keys():
        parser.error(f"there is no {sorted(unknown)}; name some of {list(SETS)}")
    if args.repeats > 1:
        own = [sys.executable, __file__, *args.sets, "--repeats", "1", "--rounds", str(args.rounds)]
        for _ in range(args.repeats):
            subprocess.run([*own, "--results", str(args.results)], check=True)
        return
    torch.set_num_threads(1)
    if not library.instruction_set():
        sys.exit("there are no native kernels here: install dynanet again where there is a C compiler")
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for name in args.sets or SETS:
            for networks in SETS[name]:
                for cell in networks():
                    rows.append(measured(*cell, Path(cache), args.rounds))
                    texts = {key: f"{v:.3g}" if isinstance(v, float) else v for key, v in rows[-1].items()}
                    print(*(f"{key}={texts[key]}" for key in texts if key not in ("rounds", "native")), flush=True)
    args.results.mkdir(exist_ok=True)
    append_rows(args.results / "kernel_speed.csv", rows, {"threads": 1, "weights": "random", "pid": os.getpid()})


if __name__ == "__main__":
    main()
