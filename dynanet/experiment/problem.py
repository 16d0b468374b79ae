"""A problem is opened data: what is to be told of what, and batches to train, calibrate and test with."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from dynanet.data.indian_pines import IndianPines
from dynanet.data.parts import BucketedBatches, Parts, sentences
from dynanet.data.ragged import Sequences, SequenceSet, pad, trimmed
from dynanet.data.text import PADDING, UNKNOWN, Sentences, Vocabulary
from dynanet.tasks.task import Classification, Task
from dynanet.train.batches import Batches

WORDS = "words.txt"  # in the folder of a run on sentences: its vocabulary


@dataclass(frozen=True)
class Problem:
    """Opened data.

    Attributes:
        title: what it is, split included: the words that stand beside every accuracy.
        classes: their names, in the order of the labels.
        channels: of an input; of sequences, the features of a frame.
        size: (height, width) of an input; of sequences, (steps of the longest, features); of sentences, (words, 1).
        mean: per channel, already subtracted from what the loaders give; None: nothing was.
        std: per channel, already divided by.
        train: augmented, shuffled.
        held_out: for calibration: not augmented, never trained on.
        test: not augmented, looked at once.
        scene: the hyperspectral scene that the samples are pixels of; None for images.
        task: what is asked of the answers.
        kind: of the inputs. Sequences have different lengths: batches of them are `data.ragged.Sequences`.
        vocabulary: of sentences, whose batches are the numbers of words, padded with 0.
    """

    title: str
    classes: Sequence[str]
    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    train: Batches
    held_out: Batches
    test: Batches
    scene: IndianPines | None = None
    task: Task = Classification()
    kind: Literal["images", "sequences", "sentences"] = "images"
    vocabulary: Vocabulary | None = None

    @property
    def arguments(self) -> dict[str, int]:
        """What the data says of a network's arguments."""
        if self.vocabulary is not None:
            return {
                "num_classes": len(self.classes), "vocabulary": len(self.vocabulary), "longest": self.size[0],
            }  # fmt: skip
        found = {"num_classes": len(self.classes), "in_channels": self.channels}
        return found | {"longest": self.size[0]} if self.kind == "sequences" else found

    def example(self, rows: int = 1) -> torch.Tensor:
        """A random input of the right shape; the longest that there are of sequences and sentences."""
        if self.kind == "sentences":
            return torch.full((rows, self.size[0]), UNKNOWN)
        if self.kind == "sequences":
            return torch.randn(rows, *self.size, generator=torch.Generator().manual_seed(0))
        return torch.randn(rows, self.channels, *self.size, generator=torch.Generator().manual_seed(0))

    def test_samples(self, count: int) -> Any:
        """The first test inputs, as many or all, in one batch that a session takes: padded to the longest there are."""
        taken: list[Any] = []
        for x, _ in self.test:
            taken += [s[:n] for s, n in zip(*x, strict=True)] if isinstance(x, Sequences) else [x]
            if (len(taken) if self.kind == "sequences" else sum(len(x) for x in taken)) >= count:
                break
        if self.kind == "sequences":
            return pad(taken[:count], steps=self.size[0])
        return torch.cat(taken)[:count].contiguous()

    def cut(self, x: Any) -> Any:
        """A batch without the steps or words that none of its samples has; of images as it is."""
        if self.kind == "sequences":
            return trimmed(x)
        if self.kind == "sentences":
            # Graphs of any length are of two or more.
            return x[:, : max(2, int((x != PADDING).sum(1).max()))].contiguous()
        return x


def of_sequences(found: Parts[SequenceSet], batch: int, seed: int) -> Problem:
    """Sequences of different lengths; training batches are of similar ones."""
    bunches = BucketedBatches(found.train, [len(s) for s in found.train.sequences], batch, seed)
    steps = max(part.longest for part in (found.train, found.held_out, found.test))
    return Problem(
        title=found.title,
        classes=found.classes,
        channels=found.train.features,
        size=(steps, found.train.features),
        mean=found.mean,
        std=found.std,
        train=Batches(bunches, 1, shuffle=True, seed=seed, collate=bunches.collate),
        held_out=Batches(found.held_out, 256, collate=SequenceSet.collate),
        test=Batches(found.test, 256, collate=SequenceSet.collate),
        kind="sequences",
    )


def of_sentences(place: str, held_out: int | None, split_seed: int, longest: int, batch: int, seed: int) -> Problem:
    """Sentences, as the numbers of their words; training batches are of similar lengths, the others all of one.

    Args:
        place: as `data.parts.sentences`.
        held_out: likewise.
        split_seed: likewise.
        longest: likewise.
        batch: sentences per step.
        seed: of training.

    Raises:
        DataError: as `data.parts.sentences`.
    """
    found, vocabulary = sentences(place, held_out, split_seed, longest)
    bunches = BucketedBatches(found.train, [len(ids) for ids in found.train.ids], batch, seed)
    plain = partial(Sentences.collate, width=longest)
    return Problem(
        title=found.title,
        classes=found.classes,
        channels=1,
        size=(longest, 1),
        mean=None,
        std=None,
        train=Batches(bunches, 1, shuffle=True, seed=seed, collate=bunches.collate),
        held_out=Batches(found.held_out, 256, collate=plain),
        test=Batches(found.test, 256, collate=plain),
        kind="sentences",
        vocabulary=vocabulary,
    )
