"""Spoken digits as films of spectrogram pictures: networks that choose which pictures to see, beside static ones.

    python recipes/frames.py train --data DIR       # names of networks; all if none
    python recipes/frames.py measure --data DIR

No video: a recording of DIR/fsdd becomes a film. A picture is 40 mel bands x 10 steps (0.1 s), the next one begins 5 steps
later; no picture holds sound of two recordings. A network looks at pictures one by one and pools what it finds, by the
maximum of features (as FrameExit) or the mean of answers (as AR-Net and SCSampler). All are trained by the same recipe.
AR-Net begins with trained networks and trains them twice more; what is beside it is trained three times as long, too.
SCSampler's networks are trained on pictures drawn one by one ("clips"), or ("whole") on whole films as the others are.
Beside each mechanism `measure` writes

- the full network, and at the same MACs (interpolated) the static one that pools alike: encoders of several widths that
  see every picture; and the full encoder on fewer pictures, evenly apart, trained so;
- the random policy of the same rate: exits by lot with the network's own odds after each picture (in expectation),
  pictures by lot, sizes and skips drawn as often as the network chose them;
- a fixed policy: all stop after the same number of pictures; as many pictures, evenly apart; the full encoder with all
  pictures at one smaller size, trained so.

MACs are those counted while the test recordings ran sparsely. All settings were fixed beforehand, but for thresholds of
exits, which come from held-out recordings. None of the three answers before a recording has ended: the first picture that
FrameExit reads lies in its middle. So seconds are those of the sound that was looked at.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from beside import Experiment, Recipe, arguments, at_same_macs
from sequences import BUDGETS, CONFIDENCE, DRAWS, RISK, beside
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from dynanet import Budget, CostModel, execute, forced, record
from dynanet.bench.machine import append_rows
from dynanet.calibrate import Frontier, tabulate
from dynanet.calibrate.frontier import apply
from dynanet.core.macs import CountMacs
from dynanet.data.buckets import BucketedBatches
from dynanet.data.ragged import Sequences, with_lengths
from dynanet.data.speech import HOP_S, load_spoken_digits
from dynanet.gates.rules import RelaxedTopK
from dynanet.mechanisms.clip_sampling import ClassSalience, ClipSampling, SalienceRank
from dynanet.mechanisms.frame_exit import ExitGate, ExitLabels, FrameExit, coarse_to_fine, frames_read
from dynanet.mechanisms.frame_select import EvenUse, FrameCost, FrameSelect
from dynanet.nets.spatial_transformer import Resize
from dynanet.train import Batches, CrossEntropy, MultiExit, adamw, anneal_temperature, exponential

BANDS, WIDE, APART = 40, 10, 5  # steps of 10 ms
SIZES = ((10, 3), (20, 5), (BANDS, WIDE))  # bands x steps; the last is as it is
CHANNELS = (4, 6, 10, 16)
FULL, CLASSES = CHANNELS[-1], 10
FEWER = (1, 2, 4)  # pictures
LONGEST = 45  # pictures of a recording
READ = 10  # pictures at most, before an exit
BETAS = (0.001, 0.01, 0.1)
PRICES = {"frame_select": (0.1,), "frame_select_hard": (0.1, 0.3)}
LONGER = ", longer"  # as FrameSelect's networks, which are trained before, with the policy, and once more
BESIDE = {  # by the first word of a network: static ones beside it, and those that see fewer pictures
    "frame_exit": ("max {}", "max {}, {} frames"),
    "clip_sampling": ("clips {}", "mean {}, {} frames" + LONGER),
    "clip_sampling_whole": ("mean {}", "mean {}, {} frames"),
    "frame_select": ("mean {}" + LONGER, "mean {}, {} frames" + LONGER),
    "frame_select_hard": ("mean {}" + LONGER, "mean {}, {} frames" + LONGER),
}


class Films(Dataset):
    """Recordings as pictures (frames, 1, bands, steps), and their labels."""

    def __init__(self, recordings) -> None:
        self.films = [steps.unfold(0, WIDE, APART)[:, None] for steps in recordings.sequences]
        self.labels = recordings.labels

    def __len__(self) -> int:
        return len(self.films)

    def __getitem__(self, index):
        return self.films[index], int(self.labels[index])

    @staticmethod
    def collate(samples):
        """A padded batch."""
        films, labels = zip(*samples, strict=True)
        lengths = torch.tensor([len(film) for film in films])
        return Sequences(pad_sequence(list(films), batch_first=True), lengths), torch.tensor(labels)


def encoder(channels, size=SIZES[-1]):
    """A picture, resized, to 4 * channels features."""
    widths = channels, 2 * channels, 2 * channels
    height, width = (-(-side // 8) for side in size)  # halved three times
    layers = [Resize(size)]
    for before, after in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * height * width, 4 * channels), nn.ReLU())


class Static(nn.Module):
    """Sees every picture, or so many evenly apart, at one size; if `drawn`, one by lot in training, as clips are."""

    def __init__(self, pool, channels, size=SIZES[-1], frames=LONGEST, drawn=False) -> None:
        super().__init__()
        self.encode, self.head = encoder(channels, size), nn.Linear(4 * channels, CLASSES)
        self.pool, self.frames, self.drawn = pool, frames, drawn

    def forward(self, x):
        """Films to (B, classes)."""
        x, lengths = with_lengths(x)
        sees = evenly(lengths, self.frames, x.shape[1])
        if self.drawn and self.training:
            one = torch.multinomial(sees.float(), 1)
            sees = torch.zeros_like(sees).scatter(1, one, value=True)
        features = self.encode(x[sees])
        if self.pool == "max":
            padded = x.new_full((*sees.shape, features.shape[1]), -torch.inf).index_put((sees,), features)
            return self.head(padded.amax(1))
        logits = self.head(features)
        return x.new_zeros(*sees.shape, CLASSES).index_put((sees,), logits).sum(1) / sees.sum(1, keepdim=True)


def evenly(lengths, frames, longest):
    """(B, longest) bool: so many frames of each film, evenly apart; all where it has no more."""
    sees = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, n in enumerate(lengths.tolist()):
        k = min(n, frames)
        sees[row, [(2 * i + 1) * n // (2 * k) for i in range(k)]] = True
    return sees


def exiting():
    """Reads from coarse to fine, and has a gate after every picture."""
    gates = [ExitGate(4 * FULL, widths=(32, 16), first=k == 0) for k in range(READ - 1)]
    return FrameExit(
        encoder(FULL), [nn.Linear(4 * FULL, CLASSES) for _ in range(READ)], gates, longest=LONGEST
    )  # fmt: skip


def ranked(full):
    """A scorer of pictures half as high and wide, before the full network, which stays as it is."""
    scorer = nn.Sequential(encoder(CHANNELS[0], SIZES[1]), nn.Linear(4 * CHANNELS[0], 1))
    return ClipSampling(scorer, each(full), FEWER[0], CLASSES)


def by_class(small, full):
    """The smallest static network says which pictures the full one is to see."""
    return ClipSampling(ClassSalience(each(small)), each(full), FEWER[0], CLASSES)


def each(static):
    """What a static network answers of one picture."""
    return nn.Sequential(static.encode, static.head)


def selecting(kind, coarse, full):
    """A size or a skip per picture: the policy's own answer at the smallest, and networks trained at the others.

    `frame_select` draws in training, as the authors do; `frame_select_hard` decides as it does afterwards.
    """
    look, nets = encoder(CHANNELS[1], SIZES[0]), [each(coarse), each(full)]
    return FrameSelect(
        look, nets, SIZES, features=4 * CHANNELS[1], hidden=32, num_classes=CLASSES, skips=(1, 2),
        light=nn.Linear(32, CLASSES), rule=RelaxedTopK(noise=kind == "frame_select", hard=True),
    )  # fmt: skip


def priced(price, model, cost):
    """The authors' objective."""
    objective = (1 - price) * CrossEntropy() + price * (FrameCost(cost) + 3.0 * EvenUse())
    return objective, [anneal_temperature(model, exponential(5.0, 0.5))]


def experiment(args):
    """The networks, and the test part."""
    recordings = [load_spoken_digits(Path(args.data) / "fsdd", part) for part in ("train", "val", "test")]
    statistics = recordings[0].statistics()
    train, held_out, test = (Films(part.standardized(*statistics)) for part in recordings)
    static = {}
    for pool, longer in (("mean", ""), ("max", ""), ("mean", LONGER)):
        builds = {f"{pool} {c}": partial(Static, pool, c) for c in CHANNELS}
        builds |= {f"{pool} {FULL}, {k} frames": partial(Static, pool, FULL, frames=k) for k in FEWER}
        if pool == "mean":
            builds |= {named(size): partial(Static, pool, FULL, size) for size in SIZES[:2]}
        epochs = 3 * args.epochs if longer else None
        static |= {name + longer: Recipe(build, epochs=epochs) for name, build in builds.items()}
    full, coarse, dynamic = f"mean {FULL}", named(SIZES[1]), {}
    for c in CHANNELS:
        static[f"clips {c}"] = Recipe(partial(Static, "mean", c, drawn=True), epochs=3 * args.epochs)
    for kind, trained in (("clip_sampling", "clips"), ("clip_sampling_whole", "mean")):
        small = lambda net, name=f"{trained} {CHANNELS[0]}": by_class(found.finished(name, args), net)  # noqa: E731
        ranks = lambda model, cost: (SalienceRank(), ())  # noqa: E731
        large = f"{trained} {FULL}"
        dynamic[f"{kind} rank"] = Recipe(ranked, ranks, large, frozen=lambda model: [model.net])
        dynamic[f"{kind} class"] = Recipe(small, None, large)
    for beta in BETAS:
        exits = lambda model, cost, beta=beta: (MultiExit([1 / READ] * READ) + ExitLabels(beta), ())  # noqa: E731
        dynamic[f"frame_exit {beta}"] = Recipe(exiting, exits)
    for kind, prices in PRICES.items():
        begun = lambda net, kind=kind: selecting(kind, found.finished(coarse, args), net)  # noqa: E731
        for price in prices:  # together; then the networks alone
            joint = f"{kind} {price}, joint"
            dynamic[joint] = Recipe(begun, partial(priced, price), full)
            dynamic[f"{kind} {price}"] = Recipe(lambda net: net, start=joint, frozen=lambda model: [model.policy])
    bunches = BucketedBatches(train, [len(film) for film in train.films], 64, args.seed)
    found = Experiment(
        "frames", "spoken digits as films of spectrogram pictures", static=static, dynamic=dynamic,
        train=Batches(bunches, 1, shuffle=True, seed=args.seed, collate=bunches.collate),
        held_out=Batches(held_out, 64, collate=Films.collate), test=Batches(test, 64, collate=Films.collate),
        samples=next(film for film in train.films if len(film) == READ)[None], optimizer=adamw(3e-3, weight_decay=0.01),
    )  # fmt: skip
    return found, test


def named(size):
    """The full encoder on pictures of a size."""
    return f"mean {FULL}, {size[0]} x {size[1]}"


def evaluate(model, batches, keep=None):
    """Means over test recordings: accuracy, MACs, pictures seen, seconds of sound in them.

    Args:
        model: in eval mode.
        batches: of films.
        keep: instead of the model's decisions: from the lengths of a batch to what `forced` takes.
    """
    execute(model, sparse=True)
    sums, films = np.zeros(4), 0
    for x, y in batches:
        decide = forced(model, keep(x.lengths)) if keep else nullcontext()
        with torch.no_grad(), record(model) as trace, CountMacs(trace) as count, decide:
            right = (model(x).argmax(1) == y).sum()
        sees = seen(model, trace, x)
        sums += float(right), count.total, float(sees.sum()), seconds(sees)
        films += len(y)
    return dict(zip(("accuracy", "macs", "frames_seen", "seconds_seen"), (sums / films).tolist(), strict=True))


def seen(model, trace, x):
    """(B, frames) bool: which pictures the network saw."""
    if isinstance(model, Static):
        return evenly(x.lengths, model.frames, x.x.shape[1])
    if isinstance(model, FrameExit):
        sees = torch.zeros(x.x.shape[:2], dtype=torch.bool)
        for row, (n, k) in enumerate(zip(x.lengths.tolist(), frames_read(trace).long().tolist(), strict=True)):
            sees[row, coarse_to_fine(n, READ)[:k]] = True
        return sees
    units = model.sizes if isinstance(model, FrameSelect) else 1
    return trace[""][0][..., :units].sum(-1) > 0


def seconds(sees):
    """Of sound in the pictures of all films together."""
    steps = torch.zeros(sees.shape[0], (sees.shape[1] - 1) * APART + WIDE, dtype=torch.bool)
    for frame in range(sees.shape[1]):
        steps[:, frame * APART : frame * APART + WIDE] |= sees[:, frame, None]
    return HOP_S * float(steps.sum())


def measure(args):
    """The rows of a seed."""
    trained, test = experiment(args)
    lengths = torch.tensor([len(film) for film in test.films])
    whole = {"frames": float(lengths.double().mean()), "test_films": len(test)}
    whole["seconds"] = HOP_S * float((APART * (lengths.double() - 1) + WIDE).mean())
    rows = []
    for network in [*trained.static, *trained.dynamic]:
        if not trained.there(network, args) or network.endswith("joint"):
            continue
        model = trained.trained(network, args)
        for row in WAYS[type(model)](model, trained, lengths):
            rows.append({"network": network, "epochs": trained.epochs(network, args), **row, **whole})
            print(rows[-1], flush=True)
    points = {row["network"]: row for row in rows if row["network"] in trained.static}
    for row in rows:
        if (kind := row["network"].split()[0]) not in BESIDE:
            continue
        static, fewer = BESIDE[kind]
        full = points[static.format(FULL)]
        row |= {"full_macs": full["macs"], "full_accuracy": full["accuracy"]}
        row["static_accuracy"] = at_same_macs(row, [points[static.format(c)] for c in CHANNELS])
        row["rarer_accuracy"] = at_same_macs(row, [full, *(points[fewer.format(FULL, k)] for k in FEWER)])
        if kind.startswith("frame_select"):
            row["fixed_accuracy"] = at_same_macs(row, [full, *(points[named(size) + LONGER] for size in SIZES[:2])])
    return rows


def reads(model, trained, lengths):
    """The row of a static network."""
    yield evaluate(model, trained.test)


def exits(model, trained, lengths):
    """The rows of a FrameExit: as its gates say, at budgets and at a risk."""
    cost = CostModel(model, trained.samples)
    held_out, table = Frontier(model, tabulate(model, trained.held_out, cost)), tabulate(model, trained.test, cost)
    end = held_out.table.mean_macs[-1]
    asked = {f"{100 * share:.0f} % of its MACs": Budget(macs=share * end) for share in BUDGETS}
    asked[f"risk of {100 * RISK:.0f} %"] = Budget(risk=RISK, confidence=CONFIDENCE)
    ways = {"likelier than not": (model, {})}
    for setting, budget in asked.items():
        choice = held_out.choose(budget)
        ways[setting] = apply(model, choice), {"held_out_accuracy": choice.accuracy, "note": choice.note}
    there = lengths.clamp(max=READ).numpy()
    for setting, (leaving_so, more) in ways.items():
        row = {"setting": setting, **evaluate(leaving_so, trained.test), **more}
        heard = np.minimum(1 + np.arange(READ), there[:, None])
        yield row | beside(row["macs"], table, leaving_so.thresholds.numpy(), heard, there)


def samples(model, trained, lengths):
    """The rows of a ClipSampling: so many pictures, beside as many by lot and evenly apart."""
    end = evaluate(model, trained.test, lambda lengths: lambda decision: torch.ones_like(decision.keep))
    for k in FEWER:
        model.clips = k
        row = {"setting": f"{k} of the pictures", **evaluate(model, trained.test), "end_accuracy": end["accuracy"]}
        chance = [evaluate(model, trained.test, partial(clips_by_lot, k)) for _ in range(DRAWS)]
        row |= {
            f"random_{key}": float(np.mean([c[key] for c in chance])) for key in ("accuracy", "macs", "frames_seen")
        }
        yield row | {"fixed_accuracy": evaluate(model, trained.test, partial(clips_evenly, k))["accuracy"]}


def clips_by_lot(k, lengths):
    """So many clips of every film, drawn."""

    def keep(decision):
        drawn = torch.rand(decision.keep.shape[:2])
        drawn[torch.arange(drawn.shape[1]) >= lengths[:, None]] = -1
        best = drawn.topk(min(k, drawn.shape[1]), dim=1).indices
        return torch.zeros_like(drawn).scatter(1, best, 1.0)[..., None]

    return keep


def clips_evenly(k, lengths):
    """So many clips of every film, evenly apart."""
    return lambda decision: evenly(lengths, k, decision.keep.shape[1])[..., None]


def selects(model, trained, lengths):
    """The row of a FrameSelect, beside choices drawn as often as its own, and every picture as it is."""
    row, uses = evaluate(model, trained.test), torch.zeros(len(SIZES) + len(model.skips))
    execute(model, sparse=True)
    for x, _ in trained.test:
        with torch.no_grad(), record(model) as trace:
            model(x)
        looked = trace["policy"][-1][..., 0] > 0
        uses += trace[""][0][looked].sum(0)
    for unit, share in zip((*SIZES, *model.skips.tolist()), uses / uses.sum(), strict=True):
        row[f"chosen_{unit[0]}x{unit[1]}" if isinstance(unit, tuple) else f"chosen_skip_{unit}"] = float(share)
    chance = [evaluate(model, trained.test, lambda lengths: partial(drawn, uses)) for _ in range(DRAWS)]
    row |= {f"random_{key}": float(np.mean([c[key] for c in chance])) for key in ("accuracy", "macs", "frames_seen")}
    largest = torch.zeros_like(uses).index_fill(0, torch.tensor(len(SIZES) - 1), 1.0)
    yield row | {"end_accuracy": evaluate(model, trained.test, lambda lengths: partial(drawn, largest))["accuracy"]}


def drawn(odds, decision):
    """One unit for every row, with these odds."""
    rows = decision.keep.shape[0]
    return nn.functional.one_hot(torch.multinomial(odds, rows, replacement=True), len(odds)).to(decision.keep)


WAYS = {Static: reads, FrameExit: exits, ClipSampling: samples, FrameSelect: selects}


if __name__ == "__main__":
    given = arguments(__doc__.split("\n")[0], "frames", epochs=12)
    given.runs = given.runs / str(given.seed)
    if given.what == "train":
        experiment(given)[0].run(given)
    else:
        torch.set_num_threads(1)
        torch.manual_seed(given.seed)
        about = {"data": "spoken digits as films of spectrogram pictures", "seed": given.seed}
        append_rows(given.results / "frames.csv", measure(given), about)
