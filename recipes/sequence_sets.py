"""Sets of labelled sequences: how they are read and parted, and how `sequences.py` trains on them."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from text_sets import agnews, sst2, trec

from dynanet.data.ragged import SequenceSet
from dynanet.data.speech import HOP_S, load_spoken_digits
from dynanet.data.splits import stratified
from dynanet.data.timeseries import load_time_series
from dynanet.zoo.pretrained_text import TextTokenizer, packaged_minilm, pretrained_text_exits

SOUND_S = 0.032  # that the first frame takes: its window, filled up for the spectrum


def digits(folder):
    """Free Spoken Digit Dataset: 40 mel bands every 10 ms; the official test part, and the next five recordings held out."""
    return (load_spoken_digits(folder / "fsdd", part) for part in ("train", "val", "test"))


def archive(name, held_out, folder):
    """A set of the UEA archive in its own split; of the training part some are held out, as many of each class."""
    known, test = (load_time_series(folder / "timeseries" / f"{name}_{part}.ts") for part in ("TRAIN", "TEST"))
    kept, aside = stratified(known.labels, [len(known) - held_out, held_out], seed=0)
    return _taken(known, kept), _taken(known, aside), test


def gestures(folder):
    """Tracks of a fingertip, 16 points (x, y) each. One recording a class, cut into windows that overlap: so the first 60 %
    of each train, the next 15 % are held out, the last 25 % test, and the 16 windows before a cut are left out.
    """
    with (folder / "timeseries" / "gesture_point_history.csv").open(newline="") as file:
        rows = torch.tensor([[float(value) for value in row] for row in csv.reader(file)])
    whole = SequenceSet(
        list(rows[:, 1:].unflatten(1, (-1, 2))), rows[:, 0].long(), "stop clockwise counter move".split()
    )
    places = [(whole.labels == kind).nonzero()[:, 0] for kind in range(len(whole.classes))]
    for first, end in ((0, 0.6), (0.6, 0.75), (0.75, 1)):
        yield _taken(
            whole, torch.cat([p[round(first * len(p)) : round(end * len(p)) - 16 * (end < 1)] for p in places])
        )


def sentences(parts, longest, folder):
    """A set of `text_sets.py`: a step is a word, or a part of one, as the 384 numbers that MiniLM knows it by. They come
    from its pretraining and stay as they are; nothing else of MiniLM is here. What is behind the `longest` is cut off.
    """
    model = pretrained_text_exits(packaged_minilm(), num_classes=2, depth=1)
    known, tokenize = (
        model.get_submodule("stages.0.0.words").weight.detach(),
        TextTokenizer(packaged_minilm(), longest=512),
    )
    for texts, labels in parts(folder / "text").values():
        ids = tokenize(texts)
        inner = [
            row[1:n][: min(longest, n - 2)] for row, n in zip(ids, (ids != 0).sum(1).tolist(), strict=True)
        ]  # no end marks
        yield SequenceSet([known[row] for row in inner], labels, [str(k) for k in range(int(labels.max()) + 1)])


def _taken(whole, rows):
    return SequenceSet([whole.sequences[i] for i in rows], whole.labels[rows], whole.classes)


@dataclass
class Task:
    """A set, and how networks are trained on it.

    Attributes:
        title: what the data is.
        parts: from the folder to train, held out and test.
        sizes: of the static networks' states, ascending; the last one's is that of all others.
        every: frames between two decisions to stop.
        batch: sequences.
        epochs: of every network.
        jumps: (R, K, N): frames read between jumps, the longest jump, and how many jumps there may be.
        seconds: between frames, and what the first takes; None where nobody says.
    """

    title: str
    parts: Callable
    sizes: tuple[int, ...]
    every: int
    batch: int
    epochs: int
    jumps: tuple[tuple[int, int, int], ...]
    seconds: tuple[float, float] | None = None


SETS = {
    "digits": Task("spoken digits", digits, (16, 32, 64, 96), 5, 64, 12, ((5, 10, 8), (2, 10, 8)), (HOP_S, SOUND_S)),
    "vowels": Task(
        "Japanese vowels", partial(archive, "JapaneseVowels", 54), (12, 24, 40, 64), 2, 32, 40, ((2, 4, 8), (1, 4, 8))
    ),
    "motions": Task(
        "basic motions", partial(archive, "BasicMotions", 12), (12, 24, 40, 64), 5, 8, 60, ((5, 10, 12), (2, 10, 16))
    ),
    "gestures": Task("gesture tracks", gestures, (12, 24, 40, 64), 2, 128, 10, ((2, 4, 5), (1, 4, 7))),
    "sst2": Task("SST-2, words", partial(sentences, sst2, 72), (16, 32, 64, 96), 4, 32, 4, ((4, 6, 5), (2, 6, 8))),
    "trec": Task("TREC, words", partial(sentences, trec, 40), (16, 32, 64, 96), 2, 32, 8, ((3, 4, 3), (2, 4, 4))),
    "agnews": Task(
        "AG News, words", partial(sentences, agnews, 100), (16, 32, 64, 96), 8, 32, 4, ((10, 20, 4), (5, 15, 6))
    ),
}
