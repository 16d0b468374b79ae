"""What skipping updates of a recurrent network is worth in milliseconds. Weights and inputs are random.

    python recipes/recurrent_speed.py --repeats 3 --results results      # lstm, gru, skim-lstm, skim-gru; all if none

Update skip (Skip RNN) and skim (Skim-RNN, whose small cell renews a sixteenth of the state) against the same network
that reads every step, in its best engine: torch's fused nn.LSTM or nn.GRU, a loop over torch's cell, ONNX Runtime's
LSTM or GRU. Speed does not depend on what the answers mean, so nothing is trained: the gate is the real one, with random
weights, and its bias is set so that a share of all steps is read; sequences differ in when and how often they read. Answers are compared with the dense form's before anything is
timed. One thread; contestants are interleaved, figures are medians over rounds; every repeat of a network is a process
of its own, and every row of it is kept.

Columns as in `dynanet/bench/comparison.py`: `session_ms` and `best_dense_ms` per sequence, `over_best_dense` their ratio,
`over_reference` against the loop over torch's cell; `macs_ratio`: MACs of reading every step over those spent, gates
included; `over_flop_ratio`: over_same_engine / macs_ratio, where the same engine reads every step
(its delta says so); `best_over_flop_ratio`: over_best_dense / macs_ratio; `over_latency_theory`: the engines' own time
for the same calls / session_ms, empty where all steps are one native call.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dynanet import CostModel, execute, record
from dynanet.bench.comparison import latency_theory
from dynanet.bench.machine import append_rows
from dynanet.bench.timing import paired, ratio
from dynanet.core.macs import CountMacs
from dynanet.mechanisms.skim import Skim
from dynanet.mechanisms.update_skip import UpdateSkip
from dynanet.session import Session
from dynanet.session.engines import OnnxRuntime

INPUTS, STEPS = 64, 100
KEEPS, BATCHES, HIDDEN = (0.25, 0.5, 0.75), (1, 8, 64, 256), (128, 256, 512)
CELLS = {"lstm": (nn.LSTMCell, nn.LSTM), "gru": (nn.GRUCell, nn.GRU)}
NETWORKS = (*CELLS, *(f"skim-{kind}" for kind in CELLS))


class LastState(nn.Module):
    """The last state of the fused network."""

    def __init__(self, net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        """(B, hidden)."""
        return (self.net(x)[0][:, -1],)


@torch.no_grad()
def skipping(kind, hidden, keep, x):
    """A layer that reads this share of the steps of x, and its fused network. A keep of 1 reads all."""
    torch.manual_seed(0)
    make_cell, make_net = CELLS[kind]
    layer, net = (
        UpdateSkip(make_cell(INPUTS, hidden), INPUTS, hidden).eval().requires_grad_(False),
        make_net(INPUTS, hidden, batch_first=True),
    )
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(net, f"{name}_l0").copy_(getattr(layer.cell, name))
    execute(layer, sparse=True)
    layer.delta.weight /= (layer(x) @ layer.delta.weight.T).std()  # sequences differ in what they skip
    reading(layer, layer.delta.bias, keep, x)
    return layer, net.eval()


@torch.no_grad()
def skimming(kind, hidden, keep, x):
    """A layer that reads this share of the steps of x, and skims the others; and its fused network."""
    every, net = skipping(kind, hidden, 1, x)
    few = hidden // 16
    layer = Skim(every.cell, CELLS[kind][0](INPUTS + hidden - few, few), INPUTS, hidden, few).eval()
    layer.requires_grad_(False)
    nn.init.normal_(layer.gate.scorer.weight)
    reading(execute(layer, sparse=True), layer.gate.scorer.bias, keep, x)
    return layer, net


def reading(layer, bias, keep, x):
    """Sets the bias so that this share of the steps is read."""
    low, high = (-20.0, 20.0) if isinstance(layer, UpdateSkip) else (-60.0, 60.0)
    while keep < 1 and high - low > 1e-3:
        bias.fill_((low + high) / 2)
        if share(layer, x) < keep:
            low = (low + high) / 2
        else:
            high = (low + high) / 2
    bias.fill_(high)


def share(layer, x):
    """Of steps that are read."""
    with record(layer) as trace:
        layer(x)
    return float(torch.stack(trace[""])[..., 0].mean())


@torch.no_grad()
def loop(cell, x):
    """Every step, by torch's cell."""
    zero = x.new_zeros(x.shape[0], cell.hidden_size)
    state = (zero, zero) if isinstance(cell, nn.LSTMCell) else zero
    for t in range(x.shape[1]):
        state = cell(x[:, t], state)
    return state[0] if isinstance(state, tuple) else state


@torch.no_grad()
def measured(network, hidden, keep, batches, rounds, cache):
    """A row per batch."""
    kind, make = network.removeprefix("skim-"), skimming if network.startswith("skim-") else skipping
    x_all = torch.randn(max(batches), STEPS, INPUTS, generator=torch.Generator().manual_seed(1))
    layer, net = make(kind, hidden, keep, x_all[:64])
    every, _ = skipping(kind, hidden, 1, x_all[:64])
    settings = {"threads": 1, "batches": sorted({1, 4, 16, *batches}), "cache": cache}
    session, same = Session(layer, x_all[:1], **settings), Session(every, x_all[:1], **settings)
    runtime = OnnxRuntime(LastState(net), [x_all[:2]], threads=1, workspaces=True, cache=cache)
    dense = {
        f"torch nn.{kind.upper()}": lambda x: LastState(net)(x)[0],
        "torch cell": lambda x: loop(every.cell, x),
        "onnxruntime": lambda x: runtime([x])[0],
    }
    cost = CostModel(layer, x_all[:1])
    for batch in batches:
        x = x_all[:batch]
        for run in dense.values():
            torch.testing.assert_close(run(x), same(x), rtol=1e-3, atol=1e-3)
        kept, spent = same_decisions(layer, session, x, cost)
        with CountMacs() as count:
            loop(every.cell, x)
        theory = latency_theory(session, [x])
        times = max(1, 8 // batch)
        contestants = {
            "session": lambda x=x: session(x),
            "same": lambda x=x: same(x),
            "theory": theory.run,
            **{name: lambda run=run, x=x: run(x) for name, run in dense.items()},
        }
        contestants = {name: lambda f=f, times=times: [f() for _ in range(times)] for name, f in contestants.items()}
        seconds = paired(contestants, rounds=rounds)
        ms = {name: 1e3 * float(np.median(s)) / times / batch for name, s in seconds.items()}
        best = min(dense, key=ms.__getitem__)
        over_reference, low, high = ratio(seconds["torch cell"], seconds["session"])
        over_same, over_best = (ratio(seconds[name], seconds["session"])[0] for name in ("same", best))
        macs_ratio = count.total / spent
        yield {
            "network": f"{'skim' if make is skimming else 'update skip'}, {kind}", "inputs": INPUTS, "hidden": hidden, "steps": STEPS, "keep": keep,
            "kept": kept, "batch": batch, "threads": 1, "rounds": rounds, "session_ms": ms["session"],
            "best_dense_ms": ms[best], "best_dense": best, "over_reference": over_reference,
            "spread": f"{low:.2f}-{high:.2f}", "over_same_engine": over_same, "over_best_dense": over_best,
            "macs_ratio": macs_ratio, "over_flop_ratio": over_same / macs_ratio,
            "best_over_flop_ratio": over_best / macs_ratio,
            "over_latency_theory": ratio(seconds["theory"], seconds["session"])[0] if theory.engines else "",
            **{f"{name.split('.')[0].replace(' ', '_')}_ms": ms[name] for name in dense},
        }  # fmt: skip


def same_decisions(layer, session, x, cost):
    """The share of steps read and the MACs spent, once answers are equal where decisions are, and nearly all are."""
    with record(execute(layer, sparse=False)) as dense:
        expected = layer(x)
    with record(session) as trace:
        answer = session(x)
    ours, theirs = torch.stack(trace[""]), torch.stack(dense[""])
    same = (ours == theirs).flatten(2).all(2).all(0)  # scores at a threshold may round to either side
    assert same.sum() >= 0.9 * len(x) - 1, f"only {int(same.sum())} of {len(x)} sequences had the same decisions"
    torch.testing.assert_close(answer[same], expected[same], rtol=1e-3, atol=1e-3)
    return float(ours[..., 0].mean()), float(cost.spent(trace).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*", help=", ".join(NETWORKS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_intermixed_args()
    networks = args.networks or list(NETWORKS)
    if unknown := set(networks) - set(NETWORKS):
        parser.error(f"there is no {sorted(unknown)}; name some of {list(NETWORKS)}")
    if args.repeats > 1 or len(networks) > 1:
        same = ["--repeats", "1", "--rounds", str(args.rounds), "--results", str(args.results)]
        for option in ("hidden", "keeps", "batches"):
            same += [f"--{option}", *map(str, getattr(args, option))]
        for _ in range(args.repeats):
            for network in networks:
                subprocess.run([sys.executable, __file__, network, *same], check=True)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        for hidden in args.hidden:
            for keep in args.keeps:
                rows = []
                for row in measured(networks[0], hidden, keep, args.batches, args.rounds, Path(cache)):
                    rows.append(row)
                    print(*(f"{k}={f'{v:.3g}' if isinstance(v, float) else v}" for k, v in row.items()), flush=True)
                args.results.mkdir(exist_ok=True)
                append_rows(args.results / "recurrent_speed.csv", rows, {})


if __name__ == "__main__":
    main()
