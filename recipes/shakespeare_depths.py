"""Tiny Shakespeare with Mixture-of-Depths: half of the blocks run for some letters only, beside models of fewer blocks.

    python recipes/shakespeare_depths.py train --data FILE [NAME ...]     # tinyshakespeare.txt; names of NETWORKS
    python recipes/shakespeare_depths.py measure --data FILE

A small causal transformer, letter by letter, all by the same recipe. A predictor decides causally in eval mode, as for
generation. `measure` writes bits per letter of the test part and the MACs that were spent, and beside each mixture the
model of fewer blocks at the same MACs (interpolated), and the mixture itself when every sequence obeys the decisions of
another one.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from shakespeare import load
from torch import nn

from dynanet import CostModel, execute, forced, record
from dynanet.bench.machine import append_rows
from dynanet.core.dynamic import layers
from dynanet.core.files import write_atomically
from dynanet.mechanisms.mixture_of_depths import MixtureOfDepths, PredictTopTokens, causal_predictor
from dynanet.ops.tokens import Tokens
from dynanet.train import CrossEntropy
from dynanet.zoo.causal_transformers import Block

LENGTH, BATCH, WIDTH = 128, 16, 96


class Letters(nn.Module):
    """Letters (B, T) to logits of the next ones (B, letters, T)."""

    def __init__(self, letters, blocks, capacity=None) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(letters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        for table in (self.letters, self.places):
            nn.init.normal_(table.weight, std=0.02)
        made = [Block(WIDTH, 4, 4 * WIDTH, 0.1) for _ in range(blocks)]
        if capacity is not None:  # every second one
            made[1::2] = [
                MixtureOfDepths(block, WIDTH, capacity=capacity, predictor=causal_predictor(WIDTH))
                for block in made[1::2]
            ]
        self.blocks, self.answer = nn.Sequential(*made), nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters))

    def forward(self, ids):
        """All letters at once."""
        x = self.letters(ids) + self.places.weight[: ids.shape[1]]
        return self.answer(self.blocks(Tokens(x)).x).transpose(1, 2)


STATIC = {f"{blocks} blocks": partial(Letters, blocks=blocks) for blocks in (3, 4, 6)}
DYNAMIC = {
    f"6 blocks, half of them for {share:.0%}": partial(Letters, blocks=6, capacity=share) for share in (0.5, 0.25)
}
NETWORKS = STATIC | DYNAMIC


def train(args, letters, parts):
    for name in args.names or NETWORKS:
        torch.manual_seed(args.seed)
        model = NETWORKS[name](len(letters)).train()
        objective = CrossEntropy() + 1.0 * PredictTopTokens() if layers(model) else CrossEntropy()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, args.steps, pct_start=0.1, cycle_momentum=False)
        started = time.time()
        for step in range(args.steps):
            starts = torch.randint(len(parts[0]) - LENGTH - 1, (BATCH,))
            batch = torch.stack([parts[0][s : s + LENGTH + 1] for s in starts.tolist()])
            with record(model) as trace:
                loss = objective(model(batch[:, :-1]), batch[:, 1:], trace)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                print(name, step, round(loss.item(), 3), f"{time.time() - started:.0f} s", flush=True)
        args.runs.mkdir(parents=True, exist_ok=True)
        saved = {"weights": model.state_dict(), "steps": args.steps}
        write_atomically(args.runs / f"{name}.pt", lambda file, saved=saved: torch.save(saved, file))


@torch.no_grad()
def evaluate(model, ids, *, exchanged=False):
    """Bits and MACs per letter, and the share of letters that the gated blocks run for."""
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    cost = CostModel(model, rows[:1, :-1])
    execute(model, sparse=not exchanged)
    bits = spent = kept = 0.0
    for part in rows.split(64):
        with record(model) as trace:
            answer = model(part[:, :-1])
        if exchanged:
            with forced(model, of_another_sequence(trace)), record(model) as trace:
                answer = model(part[:, :-1])
        bits += nn.functional.cross_entropy(answer, part[:, 1:], reduction="sum").item() / np.log(2)
        spent += float(cost.spent(trace).sum()) if layers(model) else cost.full * len(part)
        kept += sum(float(call.decision.keep.mean()) for call in trace.calls) * len(part)
    letters = rows[:, 1:].numel()
    return bits / letters, spent / letters, kept / len(rows) / len(layers(model)) if layers(model) else 1.0


def of_another_sequence(trace):
    """Replays a pass, every sequence with the decisions of the one before it."""
    keeps = iter([call.decision.keep.roll(1, 0) for call in trace.calls])
    return lambda decision: next(keeps)


def measure(args, letters, parts):
    rows = []
    for name, build in NETWORKS.items():
        if not (args.runs / f"{name}.pt").exists():
            print(f"{name} is not trained")
            continue
        saved = torch.load(args.runs / f"{name}.pt", weights_only=True)
        model = build(len(letters))
        model.load_state_dict(saved["weights"])
        bits, macs, kept = evaluate(model.eval(), parts[2])
        row = {"network": name, "bits": bits, "macs": macs, "kept": kept, "steps": saved["steps"]}
        if name in DYNAMIC:
            curve = sorted((r["macs"], r["bits"]) for r in rows if r["network"] in STATIC)
            row["static_bits"] = float(np.interp(np.log(macs), np.log([m for m, _ in curve]), [b for _, b in curve]))
            row["full_bits"], row["full_macs"] = curve[-1][1], curve[-1][0]
            row["random_bits"], row["random_macs"], _ = evaluate(model, parts[2], exchanged=True)
        print(row, flush=True)
        rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)
    about = {"data": "tiny Shakespeare", "width": WIDTH, "length": LENGTH, "seed": args.seed}
    append_rows(args.results / "shakespeare_depths.csv", [{c: row.get(c, "") for c in columns} for row in rows], about)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/shakespeare_depths"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    {"train": train, "measure": measure}[args.what](args, *load(args.data))
