"""Tiny Shakespeare, letter by letter: a small causal transformer with exits, and what leaving early and drafting save.

    python recipes/shakespeare.py train --data FILE          # tinyshakespeare.txt
    python recipes/shakespeare.py measure --data FILE

`measure` writes bits per letter of every exit; then for each way to generate: letters per second against the whole
model, the share of letters that are the whole model's, and the mean exit. Self-speculation must give the whole model's
text letter for letter, else nothing is written. Thresholds of early exits are those that Learn-then-Test promises on
prompts from the validation part, and are looked at on prompts from the test part.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from dynanet.bench.machine import append_rows
from dynanet.bench.timing import paired, ratio
from dynanet.core.files import write_atomically
from dynanet.core.macs import CountMacs
from dynanet.generate.exits import CopyState, Recompute, certify, generate
from dynanet.generate.speculative import speculate
from dynanet.generate.token_confidence import LearnedToken, Saturation, SoftmaxGap, consistency_loss
from dynanet.zoo.causal_transformers import causal_transformer, exits_loss

LENGTH, BATCH = 128, 24
SHARES = (0.999, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)


def load(path):
    """Letters as numbers, cut in the order of the text: 90 % to train, 5 % to validate, 5 % to test."""
    text = Path(path).read_text()
    letters = sorted(set(text))
    number = {letter: i for i, letter in enumerate(letters)}
    ids = torch.tensor([number[letter] for letter in text])
    return letters, ids.split(
        [int(0.9 * len(ids)), int(0.05 * len(ids)), len(ids) - int(0.9 * len(ids)) - int(0.05 * len(ids))]
    )


def build(args, letters):
    """Eight narrow layers; the shallow exits are what drafts."""
    return causal_transformer(
        vocabulary=len(letters), longest=2 * LENGTH, width=args.width, depth=8, heads=4, hidden=4 * args.width,
        exits=(0, 1, 3, 5, 7), dropout=0.1, layer_dropout=0.1,
    )  # fmt: skip


def train(args, letters, ids):
    torch.manual_seed(args.seed)
    model = build(args, letters).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps, pct_start=0.1, cycle_momentum=False)
    started = time.time()
    for step in range(args.steps):
        starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,))
        batch = torch.stack([ids[s : s + LENGTH + 1] for s in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            answers = model.answers(batch[:, :-1])
        loss = exits_loss([logits.float() for logits in answers], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(step, round(loss.item(), 3), f"{time.time() - started:.0f} s", flush=True)
    args.runs.mkdir(parents=True, exist_ok=True)
    saved = {"weights": model.state_dict(), "steps": args.steps, "width": args.width, "seed": args.seed}
    write_atomically(args.runs / "model.pt", lambda file: torch.save(saved, file))


def learned(model, ids, steps=100):
    """CALM's third confidence, fitted to a frozen model on the training part."""
    confidence = LearnedToken(model.words.embedding_dim)
    optimizer = torch.optim.Adam(confidence.parameters(), 1e-2)
    for _ in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (8,))
        with torch.no_grad():
            found = model.features(torch.stack([ids[s : s + LENGTH] for s in starts.tolist()]))
            answers = [(model.logits(k, x), x, before) for k, (x, before) in enumerate(found)]
        loss = consistency_loss(confidence, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return confidence.eval()


@torch.no_grad()
def bits(model, ids):
    """Per letter, of every exit."""
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    sums = np.zeros(len(model.exits))
    for part in rows.split(BATCH):
        for k, logits in enumerate(model.answers(part[:, :-1])):
            sums[k] += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
            ).item()
    return sums / rows[:, 1:].numel() / np.log(2)


def prompts_of(ids, count, seed):
    starts = torch.randint(len(ids) - 32, (count,), generator=torch.Generator().manual_seed(seed))
    return [ids[s : s + 32] for s in starts.tolist()]


def measure(args, letters, parts):
    saved = torch.load(args.runs / "model.pt", weights_only=True)
    args.steps, args.width, args.seed = (saved[name] for name in ("steps", "width", "seed"))  # as it was trained
    model = build(args, letters)
    model.load_state_dict(saved["weights"])
    model.eval()
    print("bits per letter:", bits(model, parts[2]).round(3))
    held_out, prompts = prompts_of(parts[1], args.held_out, 1), prompts_of(parts[2], args.prompts, 2)
    ways = {}
    for name, confidence in (
        ("softmax gap", SoftmaxGap()), ("saturation", Saturation()), ("learned", learned(model, parts[0])),
    ):  # fmt: skip
        for memory, missing in (("copied", CopyState()), ("recomputed", Recompute())):
            leave = certify(model, held_out, args.new, confidence, SHARES, risk=args.risk, delta=0.1, missing=missing)
            print(name, memory, leave and leave.thresholds[0], flush=True)
            if leave is not None:
                ways[f"{name}, {memory}"] = lambda part, leave=leave, missing=missing: generate(
                    model, part, args.new, leave=leave, missing=missing
                )
    for exit in (0, 1, 2):
        for draft in (2, 4, 8):
            ways[f"drafts of {draft} by exit {exit}"] = lambda part, e=exit, d=draft: speculate(
                model, part, args.new, exit=e, draft=d
            )
    rows = [{"way": f"bits per letter, exit {k}", "bits": b} for k, b in enumerate(bits(model, parts[2]))]
    for batch in (1, 16):
        groups = [prompts[i : i + batch] for i in range(0, args.prompts, batch)][: 4 if batch == 1 else None]
        whole = torch.cat([generate(model, part, args.new).ids for part in groups])
        same = {"whole model": lambda part: generate(model, part, args.new), **ways}
        found, macs = {}, {}
        for name, way in same.items():
            with CountMacs() as count:
                found[name] = [way(part) for part in groups]
            macs[name] = count.total / whole.numel()
            if name.startswith("drafts") and not torch.equal(torch.cat([f.ids for f in found[name]]), whole):
                raise SystemExit(f"{name}: not the whole model's text")
        with torch.no_grad():
            seconds = paired(
                {name: lambda way=way, groups=groups: [way(part) for part in groups] for name, way in same.items()},
                rounds=args.rounds,
            )
        for name, runs in found.items():
            ids = torch.cat([f.ids for f in runs])
            row = {
                "way": name, "batch": batch, "letters": ids.numel(),
                "letters_per_s": ids.numel() / float(np.median(seconds[name])),
                "times": ratio(seconds["whole model"], seconds[name])[0], "macs": macs[name],
                "macs_ratio": macs["whole model"] / macs[name], "same_letters": float((ids == whole).double().mean()),
            }  # fmt: skip
            if name.startswith("drafts"):
                row["accepted"] = sum(f.accepted for f in runs) / sum(f.drafted for f in runs)
            else:
                row["mean_exit"] = float(torch.cat([f.exits for f in runs]).double().mean())
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            rows.append(row)
    columns = ["way", "batch", "letters", "letters_per_s", "times", "macs", "macs_ratio", "same_letters", "mean_exit",
               "accepted", "bits"]  # fmt: skip
    about = {"data": "tiny Shakespeare", "steps": args.steps, "width": args.width, "risk": args.risk, "seed": args.seed,
             "threads": 1}  # fmt: skip
    append_rows(args.results / "shakespeare.csv", [{c: row.get(c, "") for c in columns} for row in rows], about)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["train", "measure"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/shakespeare"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--risk", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    letters, parts = load(args.data)
    if args.what == "train":
        train(args, letters, parts[0])
    else:
        measure(args, letters, parts)
