"""Labelled sequences and sentences in three parts: to train with, held out, and to test with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynanet.core.errors import DataError
from dynanet.data.ragged import SequenceSet
from dynanet.data.speech import load_spoken_digits
from dynanet.data.splits import stratified
from dynanet.data.text import Sentences, Vocabulary, load_labelled_lines
from dynanet.data.timeseries import load_time_series

S = TypeVar("S", SequenceSet, Sentences)


class Parts(NamedTuple, Generic[S]):
    """A set in three parts.

    Attributes:
        title: what it is, and how it was parted.
        classes: their names, in the order of the labels.
        train: to train with.
        held_out: for thresholds and budgets.
        test: looked at once.
        mean: per feature, already subtracted; None of sentences.
        std: per feature, already divided by.
    """

    title: str
    classes: list[str]
    train: S
    held_out: S
    test: S
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def spoken_digits(place: str | Path) -> Parts[SequenceSet]:
    """Spoken digits as log-mel frames, each band standardised by the training part; see `data.speech`.

    Raises:
        DataError: as `load_spoken_digits`.
    """
    parts = [load_spoken_digits(place, split) for split in ("train", "val", "test")]
    return _standardized("spoken digits, official test part, indices 5 to 9 held out", parts)


def time_series(place: str | Path, held_out: int | None, seed: int) -> Parts[SequenceSet]:
    """A set of the UEA or UCR archive in its own split, each dimension standardised by the training part.

    Args:
        place: the files' common beginning: data/JapaneseVowels for data/JapaneseVowels_TRAIN.ts and .._TEST.ts.
        held_out: series held out of the training part; a tenth if None.
        seed: which ones.

    Raises:
        DataError: as `load_time_series`, parts of other classes, or too few series to hold out so many.
    """
    known, test = (load_time_series(f"{place}_{part}.ts") for part in ("TRAIN", "TEST"))
    if known.classes != test.classes:
        raise DataError(f"{place} has the classes {known.classes} in training and {test.classes} in testing")
    rows, aside = _dealt(known.labels, held_out, seed)
    parts = [SequenceSet([known.sequences[i] for i in r], known.labels[r], known.classes) for r in (rows, aside)]
    return _standardized(f"{Path(place).name}, {len(aside)} training series held out, seed {seed}", [*parts, test])


def sentences(place: str | Path, held_out: int | None, seed: int, longest: int) -> tuple[Parts[Sentences], Vocabulary]:
    """Labelled sentences in their own split, and the vocabulary of the training part; see `data.text`.

    Args:
        place: the files' common beginning: data/stsa.binary for data/stsa.binary.train, .dev and .test; or data/TREC
            for data/TREC.train.all and .test.all. Where there is no .dev, some are held out of the training part.
        held_out: how many; a tenth if None.
        seed: which ones.
        longest: words of a sentence beyond this are cut off, with a warning.

    Raises:
        DataError: as `load_labelled_lines`, a class that training does not have, or too few to hold out so many.
    """
    texts, labels = load_labelled_lines(_file(place, "train"))
    dev = _file(place, "dev")
    if held_out is None and dev.exists():
        aside, aside_labels = load_labelled_lines(dev)
        title = f"{Path(place).name}, its own development split"
    else:
        kept, out = _dealt(labels, held_out, seed)
        aside, aside_labels = [texts[i] for i in out], labels[out]
        texts, labels = [texts[i] for i in kept], labels[kept]
        title = f"{Path(place).name}, {len(aside)} training sentences held out, seed {seed}"
    test, test_labels = load_labelled_lines(_file(place, "test"))
    classes = 1 + int(labels.max())
    for part, found in (("held-out", aside_labels), ("test", test_labels)):
        if int(found.max()) >= classes:
            raise DataError(f"{place} has the class {int(found.max())} in its {part} part, and training has {classes}")
    vocabulary = Vocabulary(texts, least=2)
    given = ((texts, labels), (aside, aside_labels), (test, test_labels))
    sets = [Sentences(some, theirs, vocabulary, longest=longest) for some, theirs in given]
    return Parts(title, [str(k) for k in range(classes)], sets[0], sets[1], sets[2]), vocabulary


def _file(place: str | Path, part: str) -> Path:
    """With or without .all behind it."""
    plain = Path(f"{place}.{part}")
    return plain if plain.exists() or not Path(f"{plain}.all").exists() else Path(f"{plain}.all")


def _dealt(labels: Tensor, held_out: int | None, seed: int) -> list[Tensor]:
    """Rows to train with, and rows held out, every class in proportion."""
    count = max(1, len(labels) // 10) if held_out is None else held_out
    if not 0 < count < len(labels):
        raise DataError(f"cannot hold out {count} of {len(labels)}; give a number from 1 to {len(labels) - 1}")
    return stratified(labels, [len(labels) - count, count], seed)


def _standardized(title: str, parts: Sequence[SequenceSet]) -> Parts[SequenceSet]:
    mean, std = parts[0].statistics()
    train, held_out, test = (part.standardized(mean, std) for part in parts)
    return Parts(title, train.classes, train, held_out, test, tuple(mean.tolist()), tuple(std.tolist()))


class BucketedBatches(Dataset[list]):
    """Batches as samples: of sequences dealt out at random, those of similar lengths together: little is padded.

    Args:
        data: sequences or sentences.
        lengths: of its samples.
        batch: samples of a batch.
        seed: of the deal.
    """

    def __init__(self, data: SequenceSet | Sentences, lengths: Sequence[int], batch: int, seed: int) -> None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        dealt = [sorted(some.tolist(), key=lambda i: lengths[i]) for some in order.split(10 * batch)]
        self.data, self.rows = data, [some[k : k + batch] for some in dealt for k in range(0, len(some), batch)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list:
        return [self.data[i] for i in self.rows[index]]

    def collate(self, samples: Sequence[list]) -> tuple:
        """The one batch, padded."""
        return self.data.collate(samples[0])
