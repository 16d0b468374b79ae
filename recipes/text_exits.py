"""SST-2 or TREC: MiniLM with an exit after each of its 6 layers, beside static encoders of fewer layers and random exits.

    python recipes/text_exits.py train sst2 --data DIR       # stsa.binary.*, TREC.*.all; or names: joint static_6 ...
    python recipes/text_exits.py measure trec --data DIR
    python recipes/text_exits.py speed sst2 --data DIR

Three ways to train exits: `joint` (all at once, the last exit teaching the others), `two_stage` (DeeBERT: the encoder
first, then frozen), `self_distilled` (FastBERT: frozen too, and the last exit is the only teacher). Three criteria to
leave by: the largest probability, entropy (DeeBERT; of two classes it says the same), patience (PABEE). Thresholds and
budgets come from held-out sentences: SST-2's development set, a tenth of TREC's training part. The test part is looked at
once. `static_accuracy` is that of the cut encoders at the same MACs (interpolated in their logarithm). `speed` is sentences per second of the
session against the static encoder in its best engine: packed or padded to the longest of a batch, eager or ONNX Runtime.
"""

import argparse
import copy
import random
from pathlib import Path

import numpy as np
import torch
from beside import at_same_macs
from text_sets import sst2, trec
from torch.utils.data import Dataset

from dynanet import Budget, CostModel, calibrate, execute, forced, record
from dynanet.bench.comparison import check_equivalent, latency_theory
from dynanet.bench.dense import rectangle_engines
from dynanet.bench.machine import append_rows
from dynanet.bench.timing import paired, ratio
from dynanet.calibrate.frontier import select_exits
from dynanet.core.dynamic import everything
from dynanet.gates.confidence import Entropy, MaxProbability, Patience
from dynanet.session import Session
from dynanet.train import Batches, MultiExit, adamw, fit, load_weights, newest, one_cycle
from dynanet.zoo.pretrained_text import TextTokenizer, packaged_minilm, pretrained_text_exits
from dynanet.zoo.text_encoder import exits_only, with_confidence

LONGEST, BATCH, DEPTH = 72, 32, 6
STATIC = {f"static_{n}": n for n in (1, 2, 3, 6)}
FROZEN = {"two_stage": (1.0, 0.0), "self_distilled": (0.0, 1.0)}  # labels, teacher
CRITERIA = {"max_probability": MaxProbability, "entropy": Entropy, "patience": Patience}  # entropy: DeeBERT, BranchyNet
NETWORKS = ["joint", *STATIC, *FROZEN]


class Bunches(Dataset):
    """Batches of sentences of about the same length, so that training pads little. An item is a batch."""

    def __init__(self, ids, labels, seed=0) -> None:
        lengths, draw = (ids != 0).sum(1).tolist(), random.Random(seed)
        order = sorted(range(len(ids)), key=lambda i: lengths[i] + draw.random() * 4)
        rows = [torch.tensor(order[i : i + BATCH]) for i in range(0, len(order), BATCH)]
        self.items = [(ids[r, : max(lengths[i] for i in r.tolist())], labels[r]) for r in rows]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def batches(self, **more):
        """For training and validation."""
        return Batches(self, 1, collate=lambda items: items[0], **more)


SETS = {"sst2": ("SST-2 (stsa.binary)", sst2, 2, 2), "trec": ("TREC", trec, 6, 4)}  # title, parts, classes, epochs


def load(args, part):
    """(ids, labels)"""
    texts, labels = SETS[args.set][1](args.data)[part]
    return TextTokenizer(packaged_minilm(), longest=LONGEST)(texts, width=LONGEST), labels


class OnlyTeacher(MultiExit):
    """Exits learn what the last one says, and no labels (FastBERT)."""

    def __call__(self, answer, y, trace):
        """KL from the last exit to every other."""
        exits = next(iter(trace.answers.values()))
        teacher = exits[-1].detach().log_softmax(1)
        return torch.stack([self._taught(e, teacher) for e in exits[:-1]]).sum()


def build(name, classes, runs=None):
    """The network; those with a frozen encoder start from `static_6`, once that is trained."""
    depth = STATIC.get(name, DEPTH)
    exits = [depth - 1] if name in STATIC else None
    model = pretrained_text_exits(packaged_minilm(), num_classes=classes, longest=LONGEST, depth=depth, exits=exits)
    if name in FROZEN and runs is not None:
        full = pretrained_text_exits(packaged_minilm(), num_classes=classes, longest=LONGEST, exits=[DEPTH - 1])
        load_weights(full, newest(runs / "static_6"))
        embed, *layers = full.stages[0]
        model.stages[0][0].load_state_dict(embed.state_dict())
        for stage, layer in zip(model.stages, layers, strict=True):
            stage[-1].load_state_dict(layer.state_dict())
        model.exits[-1].load_state_dict(full.exits[0].state_dict())
        exits_only(model)
    return model


def train(name, args, data, held_out):
    torch.manual_seed(args.seed)
    model, frozen = build(name, args.classes, args.runs), name in FROZEN
    objective = MultiExit(distill=0.0 if name in STATIC else 0.5, temperature=1.0)
    if frozen:
        labels, teacher = FROZEN[name]
        objective = OnlyTeacher(temperature=1.0) if teacher else MultiExit([labels] * (DEPTH - 1) + [0.0])
    run = fit(
        model, data.batches(shuffle=True, seed=args.seed), held_out.batches(), objective=objective,
        epochs=args.epochs, folder=args.runs / name, optimizer=adamw(1e-3 if frozen else 1e-4, weight_decay=0.01),
        scheduler=one_cycle(warmup=0.1), seed=args.seed, resume=True, progress=False,
        trainer_options={"precision": "bf16-mixed"},
    )  # fmt: skip
    print(name, {key: round(value, 4) for key, value in run.metrics.items()}, flush=True)


def trained(name, args):
    model = build(name, args.classes)
    load_weights(model, newest(args.runs / name))
    return execute(model.eval(), sparse=True)


@torch.no_grad()
def evaluate(model, cost, data):
    """(accuracy, MACs per sentence, share that leaves at every exit)."""
    right = spent = seen = 0
    shares = np.zeros(model.steps)
    for ids, labels in data.items:
        with record(model) as trace:
            right += int((model(ids).argmax(1) == labels).sum())
        went_on = sum((keep[:, 0] for keep in trace[""]), torch.zeros(len(labels)))
        shares += np.bincount(went_on.long().numpy(), minlength=model.steps)
        spent, seen = spent + float(cost.spent(trace).sum()), seen + len(labels)
    return right / seen, spent / seen, shares / seen


def measure(args, held_out, test):
    about = {"data": args.title, "epochs": args.epochs, "seed": args.seed}
    example = torch.full((1, LONGEST), 7)
    rows = []
    for name in [n for n in NETWORKS if (args.runs / n).exists()]:
        model = trained(name, args)
        cost = CostModel(model, example)
        if name in STATIC:
            accuracy, macs, _ = evaluate(model, cost, test)
            held, _, _ = evaluate(model, cost, held_out)
            rows.append(
                {"network": name, "rule": "static", "budget": "", "held_out": held, "accuracy": accuracy, "macs": macs}
            )
            continue
        looked = calibrate.tabulate(model, test.items, cost)  # for random exits: what a draw with these rates expects
        for rule, confidence in CRITERIA.items():
            network = execute(with_confidence(model, confidence()).eval(), sparse=True)
            frontier = calibrate.calibrate(network, held_out.items, cost)
            table = frontier.table
            full, points = float(table.accuracy[-1]), frontier.curve(60)
            wanted = {f"{share:.0%}": share * table.mean_macs[-1] for share in (0.25, 0.5, 0.75)}
            near = [c for c in points if c.accuracy >= full - 0.005]
            wanted["within 0.5 points"] = min(c.macs for c in near) if near else table.mean_macs[-1]
            for budget, macs in wanted.items():
                macs = min(max(macs, 1.0001 * table.mean_macs.min()), table.mean_macs.max())
                early = execute(frontier.at(Budget(macs=float(macs))), sparse=True)
                accuracy, spent, shares = evaluate(early, cost, test)
                rows.append({
                    "network": name, "rule": rule, "budget": budget, "held_out": frontier.choose(Budget(macs=float(macs))).accuracy,
                    "accuracy": accuracy, "macs": spent, "random_accuracy": float(shares @ looked.accuracy),
                    "random_macs": float(shares @ looked.mean_macs),
                    "shares": " ".join(f"{share:.3f}" for share in shares),
                })  # fmt: skip
            last, whole, _ = evaluate(network, cost, test)
            rows.append(
                {
                    "network": name,
                    "rule": rule,
                    "budget": "never early",
                    "held_out": full,
                    "accuracy": last,
                    "macs": whole,
                }
            )
    static = [row for row in rows if row["rule"] == "static"]
    most_expensive = max(row["macs"] for row in static)
    for row in rows:
        if row["rule"] != "static":  # six exits' classifiers are a few thousandths of an encoder
            row["static_accuracy"] = at_same_macs(row | {"macs": min(row["macs"], most_expensive)}, static)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    append_rows(args.results / "text_exits.csv", rows, about)


def trimmed(ids):
    return ids[:, : int((ids != 0).sum(1).max())]


def speed(args, held_out, test_ids, labels):
    """The session at the budget within half a point, with the exits that pay, against its own weights with the last exit
    alone: the static encoder, in every engine. Equal answers are asserted first. Accuracies are of all test sentences.
    """
    model = trained(args.network, args)
    example = torch.full((1, LONGEST), 7)
    frontier = calibrate.calibrate(model, held_out.items, CostModel(model, example))
    model.active = select_exits(frontier.table, model.exit_macs(example), Budget(macs=cheapest(frontier)))
    cost = CostModel(model, example)
    frontier = calibrate.calibrate(model, held_out.items, cost)
    early = execute(frontier.at(Budget(macs=cheapest(frontier))), sparse=True)
    test = Bunches(test_ids, labels)
    accuracy, _, shares = evaluate(early, cost, test)
    table = calibrate.tabulate(model, test.items, cost)
    reached = {
        "accuracy": accuracy, "whole_accuracy": float(table.accuracy[-1]),
        "random_accuracy": float(shares @ table.accuracy),
    }  # fmt: skip
    ids = test_ids[torch.randperm(len(test_ids), generator=torch.Generator().manual_seed(0))[:256]]
    lengths = (ids != 0).sum(1)
    example = ids[lengths == lengths.median()][:1]
    session = Session(early, example, batches=(1, 4, 16, 32))
    static = only_last(model)
    packed = Session(static, example, batches=(1, 4, 16, 32))
    dense = execute(only_last(model), sparse=False)
    runtime = rectangle_engines(only_last(model), ids)["onnxruntime"]
    with torch.no_grad():
        expected = dense(ids)
        for name, answer in (
            ("packed", packed(ids)),
            ("onnxruntime", runtime([trimmed(ids)])[0]),
            ("sparse", static(ids)),
        ):
            torch.testing.assert_close(answer, expected, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    check_equivalent(early, session, ids)
    rows = []
    with record(session) as trace:
        session(ids)
    spent, whole = (
        float(cost.spent(trace).mean()),
        float(CostModel(static, torch.full((1, LONGEST), 7)).spent(traced(static, ids)).mean()),
    )
    for batch in (1, 32):
        groups = ids[: 64 if batch == 1 else 256].split(batch)
        count = sum(len(g) for g in groups)
        theory = latency_theory(session, groups)
        with torch.no_grad():
            seconds = paired({
                "session": lambda groups=groups: [session(g) for g in groups],
                "stream": lambda groups=groups, b=batch: list(session.stream(torch.cat(groups), batch=b)),
                "kept": lambda groups=groups: all_kept(session, groups),
                "engines": theory.run_engines,
                "theory": theory.run,
                "static packed session": lambda groups=groups: [packed(g) for g in groups],
                "static packed eager": lambda groups=groups: [static(g) for g in groups],
                "static padded eager": lambda groups=groups: [dense(trimmed(g)) for g in groups],
                "static padded onnxruntime": lambda groups=groups: [runtime([trimmed(g)]) for g in groups],
            }, rounds=args.rounds)  # fmt: skip
        statics = [name for name in seconds if name.startswith("static")]
        best = min(statics, key=lambda name: np.median(seconds[name]))
        rows.append({
            "network": args.network, "exits": " ".join(map(str, model.active)), "batch": batch, "threads": 1, "sentences": count, **reached,
            **{f"{name.replace(' ', '_')}_per_s": count / float(np.median(s)) for name, s in seconds.items()},
            "best_static": best, "over_best_static": ratio(seconds[best], seconds["session"])[0],
            "stream_over_best_static": ratio(seconds[best], seconds["stream"])[0],
            "over_latency_theory": ratio(seconds["theory"], seconds["session"])[0],
            "stream_over_latency_theory": ratio(seconds["theory"], seconds["stream"])[0],
            "over_engines": ratio(seconds["engines"], seconds["session"])[0],
            "stream_over_engines": ratio(seconds["engines"], seconds["stream"])[0],
            "macs_ratio": whole / spent,
        })  # fmt: skip
        print(rows[-1], flush=True)
    append_rows(args.results / "text_exits_speed.csv", rows, {"data": f"{args.title}, test sentences"})


def cheapest(frontier):
    """MACs of the cheapest choice that loses at most half a point of held-out accuracy."""
    full = float(frontier.table.accuracy[-1])
    return min(c.macs for c in frontier.curve(60) if c.accuracy >= full - 0.005)


def only_last(model):
    other = copy.deepcopy(model)
    other.active = [DEPTH - 1]
    return execute(other.eval(), sparse=True)


def traced(model, ids):
    with torch.no_grad(), record(model) as trace:
        model(ids)
    return trace


def all_kept(session, groups):
    with forced(session, everything):
        for ids in groups:
            session(ids)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["train", "measure", "speed"])
    parser.add_argument("set", choices=SETS)
    parser.add_argument("names", nargs="*", help="of networks to train; all if none")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, help="runs/SET_exits if not given")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--network", default="two_stage", help="whose speed")
    parser.add_argument("--epochs", type=int, help="2 for SST-2, 4 for TREC if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()
    args.title, _, args.classes, epochs = SETS[args.set]
    args.epochs, args.runs = args.epochs or epochs, args.runs or Path("runs") / f"{args.set}_exits"
    torch.set_num_threads(1)
    held_out = Bunches(*load(args, "held_out"))
    if args.what == "train":
        texts = Bunches(*load(args, "train"))
        for network in args.names or NETWORKS:
            train(network, args, texts, held_out)
    elif args.what == "measure":
        measure(args, held_out, Bunches(*load(args, "test")))
    else:
        speed(args, held_out, *load(args, "test"))
