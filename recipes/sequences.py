"""Spoken digits, vowels, motions, gestures, words: recurrent networks that skip, skim, jump or stop, beside static ones.

    python recipes/sequences.py train digits --data DIR       # names of sets in `sequence_sets.py`, and of networks; all if none
    python recipes/sequences.py measure --data DIR            # all sets whose runs are there, for this --seed

DIR holds `fsdd/recordings/*.wav`, `timeseries/` with JapaneseVowels, BasicMotions and the gesture tracks, and `text/` with
SST-2, TREC and AG News; frames of a text are its words. All networks of a set are trained by the same recipe. Beside each
mechanism `measure` writes

- the full network and the static one of the same MACs: GRUs of several sizes that read every frame (interpolated);
- the full GRU that reads every second or fourth frame only, at the same MACs (interpolated);
- the random policy of the same rate: for skips, updates drawn at the network's own rate, in the network as it was trained,
  and in networks that were trained with random updates (interpolated); for jumps, each drawn as often as the network
  chose it, and in networks that were trained with random jumps; for stops, a lot at every decision with the odds at which
  the network stops there, in expectation; and, as another policy that sees nothing, one frame at which all stop.

Budgets (`BUDGETS`), EARLIEST's weights (`EARLINESS`) and the bounds of jumps (`Task.jumps`) were fixed beforehand;
thresholds come from held-out sequences alone. MACs are those of each sequence without padding.
"""

from argparse import Namespace
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from beside import Experiment, Recipe, arguments, at_same_macs
from sequence_sets import SETS
from torch import nn

from dynanet import Budget, CostModel, Decision, Gate, execute, forced, record
from dynanet.bench.machine import append_rows
from dynanet.calibrate import Frontier, tabulate
from dynanet.calibrate.budgeted import leaving
from dynanet.calibrate.frontier import apply
from dynanet.core.dynamic import layers
from dynanet.data.buckets import BucketedBatches
from dynanet.data.ragged import SequenceSet, as_sequences, pad
from dynanet.gates.rules import Gumbel, StraightThrough
from dynanet.mechanisms.early_stop import Earliest, EarlyStop, steps_read
from dynanet.mechanisms.jump import Jump, ReinforceJumps
from dynanet.mechanisms.skim import Skim
from dynanet.mechanisms.update_skip import UpdateSkip
from dynanet.train import (
    Batches,
    BudgetPenalty,
    CrossEntropy,
    MultiExit,
    adamw,
    anneal_temperature,
    exponential,
    linear,
)

BUDGETS = (0.5, 0.25)  # of the frames for skips; of the MACs of reading to the end for stops
RISK, CONFIDENCE = 0.05, 0.9
EARLINESS = (0.003, 0.01, 0.03)
DRAWS = 5  # of random updates; the mean is written


class Reading(nn.Module):
    """A GRU that reads every frame, or every n-th, and answers at the end."""

    def __init__(self, features, classes, hidden, nth=1) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(features, hidden, batch_first=True), nn.Linear(hidden, classes)
        self.features, self.nth = features, nth

    def forward(self, x):
        """Sequences, or (B, T, features), to (B, classes)."""
        frames, lengths = as_sequences(x, self.features)
        frames, lengths = frames[:, :: self.nth], -(-lengths // self.nth)
        packed = nn.utils.rnn.pack_padded_sequence(frames, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.gru(packed)[1][0])


def skipping(features, classes, hidden):
    """A GRU whose state is copied where nothing is worth an update."""
    return nn.Sequential(UpdateSkip(nn.GRUCell(features, hidden), features, hidden), nn.Linear(hidden, classes))


def skimming(features, classes, hidden):
    """A GRU, and one a sixteenth as large; which of them runs is drawn in training (Gumbel), as in the paper."""
    small = hidden // 16
    cells = nn.GRUCell(features, hidden), nn.GRUCell(features + hidden - small, small)
    skim = Skim(*cells, features, hidden, small, Gumbel(), reading=0.0, detached=False)
    return nn.Sequential(skim, nn.Linear(hidden, classes))


def skimming_hard(features, classes, hidden):
    """The same without draws: in training it decides as it does afterwards. It reads at first. `Skim`'s defaults, but
    that its gate hands no gradient on to the frames either.
    """
    model, score = skimming(features, classes, hidden), nn.Linear(features + hidden, 1)
    nn.init.constant_(score.bias, 2.0)
    model[0].gate = Gate(Aside(score), StraightThrough())
    return model


class Aside(nn.Module):
    """A scorer that hands no gradient on to the state: through the choices of all frames before it would explode."""

    def __init__(self, scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, x):
        """As the scorer."""
        return self.scorer(x.detach())


def jumping(bounds, features, classes, hidden):
    """A GRU that reads a few frames, jumps over others, and so on: `bounds` are the paper's R, K and N."""
    read, reach, jumps = bounds
    layer = Jump(nn.GRUCell(features, hidden), features, hidden, read=read, reach=reach, jumps=jumps)
    return nn.Sequential(layer, nn.Linear(hidden, classes))


def jumping_by_lot(bounds, features, classes, hidden):
    """The same, each jump from 1 to the longest as likely as another, in training too."""
    model = jumping(bounds, features, classes, hidden)
    odds = torch.ones(bounds[1] + 1)
    odds[0] = 0  # a stop
    model[0].gate = Lot(odds)
    return model


class Lot(nn.Module):
    """In the place of a gate: one of its units, drawn with these odds whatever it sees."""

    def __init__(self, odds) -> None:
        super().__init__()
        self.register_buffer("odds", odds)

    def forward(self, hidden):
        """(rows, features) to one unit for every row."""
        units = len(self.odds)
        drawn = torch.multinomial(self.odds, max(hidden.shape[0], 1), replacement=True)[: hidden.shape[0]]
        keep = nn.functional.one_hot(drawn, units).to(hidden)
        return Decision(keep, self.odds.log().expand_as(keep).to(hidden))


def stopping(longest, every, learned, features, classes, hidden):
    """A GRU that may answer every few frames, by confidence or as it has learned."""
    policy = nn.Linear(hidden, 1) if learned else None
    if policy is not None:
        nn.init.constant_(policy.bias, -3.0)  # reads on at first
    head = nn.Linear(hidden, classes)
    return EarlyStop(nn.GRUCell(features, hidden), head, features, hidden, longest, every=every, policy=policy)


def by_lot(build, rate):
    """A network whose updates are drawn, in training too."""
    model = build()
    for layer in layers(model).values():
        layer.force = drawn(rate)
    return model


def drawn(rate):
    """Unit 0 for this share of the frames; a second unit, if there is one, for the others."""

    def keep(decision):
        runs = (torch.rand_like(decision.keep[..., :1]) < rate).to(decision.keep)
        return torch.cat([runs, 1 - runs], -1)[..., : decision.keep.shape[-1]]

    return keep


def within(share, frames, model, cost):
    """Cross-entropy, and a budget of this share of a set's mean frames for the (big) cell; the rest, if any, is skimmed."""
    big, *small = cost.unit["0"].tolist()
    all_read, asked = (cost.always + frames * (s * big + (1 - s) * sum(small)) for s in (1, share))
    budget = BudgetPenalty(Budget(macs=asked), cost)
    falling = linear(all_read, asked, share=0.5)
    lower = lambda progress: setattr(budget, "macs", falling(progress))  # noqa: E731
    cools = [anneal_temperature(model, exponential(1.0, 0.5))] if small else []
    return CrossEntropy() + 4.0 * (cost.full / all_read) ** 2 * budget, [lower, *cools]


def experiment(name, folder, args):
    """The networks of a set, and its test part."""
    task = SETS[name]
    train, held_out, test = task.parts(folder)
    statistics = train.statistics()
    train, held_out, test = (part.standardized(*statistics) for part in (train, held_out, test))
    frames = sum(s.shape[0] for s in train.sequences) / len(train)
    longest = max(part.longest for part in (train, held_out, test))
    shape = train.features, len(train.classes)
    hidden = task.sizes[-1]

    def recipe(build, objective=None):
        build = partial(build, *shape, hidden)
        return Recipe(build, objective) if objective else Recipe(build)

    def batches(part):
        return Batches(part, task.batch, collate=SequenceSet.collate)

    bunches = BucketedBatches(train, [len(s) for s in train.sequences], task.batch, args.seed)
    static = {f"hidden {n}": Recipe(partial(Reading, *shape, n)) for n in task.sizes}
    dynamic = {f"every {n} frames": recipe(partial(Reading, nth=n)) for n in (4, 2)}
    stop = partial(stopping, longest, task.every)
    dynamic["early_stop"] = recipe(partial(stop, False), lambda model, cost: (MultiExit(), ()))
    for weight in EARLINESS:
        learned = lambda model, cost, weight=weight: (CrossEntropy() + Earliest(weight), ())  # noqa: E731
        dynamic[f"earliest {weight}"] = recipe(partial(stop, True), learned)
    for kind, build in (("update_skip", skipping), ("skim", skimming), ("skim_hard", skimming_hard)):
        for share in BUDGETS:
            dynamic[f"{kind} {share}"] = recipe(build, partial(within, share, frames))
            if build is not skimming_hard:  # by lot it is as the other
                dynamic[f"{kind} {share}, by lot"] = Recipe(partial(by_lot, partial(build, *shape, hidden), share))
    for bounds in task.jumps:
        jump = "jump {}-{}-{}".format(*bounds)
        dynamic[jump] = recipe(partial(jumping, bounds), lambda model, cost: (CrossEntropy() + ReinforceJumps(), ()))
        dynamic[f"{jump}, by lot"] = recipe(partial(jumping_by_lot, bounds))
    return Experiment(
        "sequences", task.title, static=static, dynamic=dynamic,
        train=Batches(bunches, 1, shuffle=True, seed=args.seed, collate=bunches.collate),
        held_out=batches(held_out),
        test=batches(test), samples=pad(sorted(train.sequences, key=len)[-1:]).x, optimizer=adamw(3e-3, weight_decay=0.01),
    ), test  # fmt: skip


def evaluate(model, cost, trained, keep=None):
    """Means over test sequences: accuracy, MACs, frames that the (big) cell read, frames heard before the answer.

    Args:
        model: in eval mode.
        cost: for sequences as long as `trained.samples`.
        trained: the Experiment.
        keep: instead of the model's decisions, as for `forced`.
    """
    execute(model, sparse=True)
    nth = model.nth if isinstance(model, Reading) else 1
    longest = -(-trained.samples.shape[1] // nth)
    each = (cost.always - CostModel(model, trained.samples[:, :1]).always) / (longest - 1)  # of a frame, in no unit
    sums, seen = np.zeros(4), 0
    for x, y in trained.test:
        with torch.no_grad(), record(model) as trace, forced(model, keep) if keep else nullcontext():
            right = int((model(x).argmax(1) == y).sum())
        padded = longest + x.lengths.neg() // nth  # frames that this sequence does not have
        spent = (cost.spent(trace) if layers(model) else cost.always) - each * padded
        sums += right, float(spent.sum()), *_frames(model, trace, x)
        seen += len(y)
    return dict(zip(("accuracy", "macs", "frames_read", "frames_heard"), (sums / seen).tolist(), strict=True))


def _frames(model, trace, x):
    """(read, heard) of all rows together."""
    if isinstance(model, EarlyStop):
        read = float(steps_read(trace).sum())
        return read, read
    heard = float(x.lengths.sum())
    if isinstance(model, Reading):
        return float(-(x.lengths.neg() // model.nth).sum()), heard
    read = torch.stack(trace["0"], 1)[..., 0]
    if isinstance(model[0], Jump):  # nothing behind the last frame that it reads changes its answer
        heard = float((read * torch.arange(1, 1 + read.shape[1])).amax(1).sum())
    return float(read.sum()), heard


def measure(name, folder, args):
    """The rows of a set."""
    task, (trained, test) = SETS[name], experiment(name, folder, args)
    frames, rows = np.mean([len(s) for s in test.sequences]), []
    for network in [*trained.static, *trained.dynamic]:
        if not trained.there(network, args):
            continue
        model = trained.trained(network, args)
        cost = CostModel(model, trained.samples)
        found = (
            stops(model, cost, trained, test)
            if isinstance(model, EarlyStop)
            else [reads(network, model, cost, trained)]
        )
        for row in found:
            row |= {"set": name, "network": network, "epochs": trained.epochs(network, args)}
            row |= {"test_sequences": len(test), "frames": frames}
            if task.seconds:
                apart, first = task.seconds
                row["seconds_heard"], row["seconds"] = (first + apart * (n - 1) for n in (row["frames_heard"], frames))
            rows.append(row)
            print(row, flush=True)
    full = next(row for row in rows if row["network"] == f"hidden {task.sizes[-1]}")
    for row in rows:
        if row["network"] in trained.dynamic and not row["network"].endswith("by lot"):
            row |= {"full_macs": full["macs"], "full_accuracy": full["accuracy"]}
            row["static_accuracy"] = at_same_macs(row, [r for r in rows if r["network"] in trained.static])
            row["rarer_accuracy"] = at_same_macs(row, [r for r in rows if r["network"].startswith("every")] + [full])
            kind = row["network"].split()[0].removesuffix("_hard")
            lots = [r for r in rows if r["network"].startswith(kind) and r["network"].endswith("by lot")]
            row["trained_random_accuracy"] = at_same_macs(row, [*lots, full]) if lots else None
    return rows


def reads(network, model, cost, trained):
    """The row of a network that answers at the end; if it decides, beside its own rate by lot."""
    row = evaluate(model, cost, trained)
    if layers(model) and not network.endswith("by lot"):
        if isinstance(model[0], Jump):
            with drawn_as_often(model, cost, trained):
                chance = [evaluate(model, cost, trained) for _ in range(DRAWS)]
        else:
            rate = row["frames_read"] / row["frames_heard"]
            chance = [evaluate(model, cost, trained, drawn(rate)) for _ in range(DRAWS)]
        row |= {f"random_{k}": float(np.mean([c[k] for c in chance])) for k in ("accuracy", "macs", "frames_heard")}
    return row


@contextmanager
def drawn_as_often(model, cost, trained):
    """Inside, every jump is drawn, as often as the network chooses it on test sequences."""
    gate, chosen = model[0].gate, []
    counting = gate.register_forward_hook(lambda module, given, decision: chosen.append(decision.keep.sum(0)))
    evaluate(model, cost, trained)
    counting.remove()
    model[0].gate = Lot(torch.stack(chosen).sum(0))
    try:
        yield
    finally:
        model[0].gate = gate


def stops(model, cost, trained, test):
    """The rows of a network that stops: at budgets and at a risk, or as its policy says and at budgets."""
    held_out = Frontier(model, tabulate(model, trained.held_out, cost))
    table = tabulate(model, trained.test, cost)
    lengths = np.array([len(s) for s in test.sequences])
    heard = np.minimum((1 + np.arange(table.exits)) * model.every, lengths[:, None])
    end = held_out.table.mean_macs[-1]
    asked = {f"{100 * share:.0f} % of its MACs": Budget(macs=share * end) for share in BUDGETS}
    if model.policy is None:
        asked[f"risk of {100 * RISK:.0f} %"] = Budget(risk=RISK, confidence=CONFIDENCE)
    ways = {} if model.policy is None else {"likelier than not": (model, {})}
    for setting, budget in asked.items():
        choice = held_out.choose(budget)
        ways[setting] = apply(model, choice), {"held_out_accuracy": choice.accuracy, "note": choice.note}
    for setting, (stopping_so, more) in ways.items():
        row = {"setting": setting, **evaluate(stopping_so, cost, trained), **more}
        yield row | beside(row["macs"], table, stopping_so.thresholds.numpy(), heard, lengths)


def beside(macs, table, thresholds, heard, lengths):
    """What is reached by lot, where all stop after the same number of frames at the same MACs, and at the end.

    Args:
        macs: spent by thresholds.
        table: of N test sequences and K decisions.
        thresholds: (K - 1,).
        heard: (N, K) frames.
        lengths: (N,).
    """
    odds = by_the_odds(table, thresholds, heard < lengths[:, None])
    chance = {"accuracy": table.correct, "macs": table.macs, "frames_heard": heard}
    row = {f"random_{key}": float((odds * value).sum(1).mean()) for key, value in chance.items()}
    row["end_accuracy"] = float(table.accuracy[-1])
    row["fixed_accuracy"] = float(np.interp(macs, table.mean_macs, table.accuracy))
    row["fixed_frames"] = float(np.interp(macs, table.mean_macs, heard.mean(0)))
    return row


def by_the_odds(table, thresholds, left):
    """(N, K): how probable every stop is for a row that stops by lot, with the odds at which the thresholds let rows stop.

    Args:
        table: of N rows and K decisions.
        thresholds: (K - 1,).
        left: (N, K), does a row go on after this step? Where it does not, it stops.
    """
    exits = leaving(table.scores, thresholds)[:, None]
    steps = np.arange(table.exits)
    arrived, leaves = left & (exits >= steps), left & (exits == steps)
    odds = leaves.sum(0) / np.maximum(arrived.sum(0), 1)
    stop = np.where(left, odds, 1.0)
    stop[:, -1] = 1.0
    return stop * np.concatenate([np.ones((len(stop), 1)), np.cumprod(1 - stop, 1)[:, :-1]], 1)


if __name__ == "__main__":
    given = arguments(__doc__.split("\n")[0], "sequences", epochs=None)
    folder = Path(given.data)
    for name in [name for name in given.names if name in SETS] or SETS:
        networks = [network for network in given.names if network not in SETS]
        mine = {"runs": given.runs / name / str(given.seed), "epochs": given.epochs or SETS[name].epochs}
        args = Namespace(**(vars(given) | mine | {"names": networks}))
        if args.what == "train":
            experiment(name, folder, args)[0].run(args)
        elif args.runs.exists():
            torch.set_num_threads(1)
            torch.manual_seed(args.seed)
            rows = measure(name, folder, args)
            append_rows(args.results / "sequences.csv", rows, {"data": SETS[name].title, "seed": args.seed})
