"""Sequences of different lengths in one padded batch, whose padding is never computed with."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynanet.core.errors import DataError, InputError
from dynanet.data.deviations import divisors


class Sequences(NamedTuple):
    """A padded batch and the length of each row.

    Attributes:
        x: (B, T, features), or (B, T, C, H, W) for videos; 0 beyond the end of a row (NaN would spread in the dense
            form).
        lengths: (B,) int64, from 1 to T.
    """

    x: Tensor
    lengths: Tensor


class SequenceSet(Dataset[tuple[Tensor, int]]):
    """Labelled sequences of any lengths.

    Args:
        sequences: (steps, features) each, with equal numbers of features.
        labels: (N,) int64.
        classes: the classes' names.
        rate: samples per second of the sounds that the sequences were made of; None of other sequences.

    Raises:
        DataError: no sequences, not one label each, an invalid one (`check_sequence`), or unequal numbers of features.
    """

    def __init__(
        self, sequences: Sequence[Tensor], labels: Tensor, classes: Sequence[str], *, rate: int | None = None
    ) -> None:
        if not sequences or len(sequences) != len(labels):
            raise DataError(f"{len(sequences)} sequences and {len(labels)} labels; give one or more, with a label each")
        for number, sequence in enumerate(sequences):
            check_sequence(sequence, f"sequence {number}")
        widths = sorted({s.shape[1] for s in sequences})
        if len(widths) > 1:
            raise DataError(f"sequences of {widths} features in one set; expected the same number in all")
        self.sequences = list(sequences)
        self.labels = labels
        self.classes = list(classes)
        self.rate = rate

    @property
    def features(self) -> int:
        """Number of features of a step."""
        return self.sequences[0].shape[1]

    @property
    def longest(self) -> int:
        """Number of steps of the longest sequence."""
        return max(s.shape[0] for s in self.sequences)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.sequences[index], int(self.labels[index])

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every feature over all steps, (features,) each; deviations of 0 become 1.

        Use those of the training set for every part.
        """
        steps = torch.cat(self.sequences).double()
        mean = steps.mean(0)
        return mean.float(), divisors(mean, steps.std(0, correction=0)).float()

    def standardized(self, mean: Tensor, deviation: Tensor) -> "SequenceSet":
        """The same set with every feature shifted and scaled."""
        scaled = [(s - mean) / deviation for s in self.sequences]
        return SequenceSet(scaled, self.labels, self.classes, rate=self.rate)

    @staticmethod
    def collate(samples: Sequence[tuple[Tensor, int]]) -> tuple[Sequences, Tensor]:
        """A padded batch and its labels (B,); for a DataLoader's `collate_fn`."""
        sequences, labels = zip(*samples, strict=True)
        return pad(sequences), torch.tensor(labels)


def pad(sequences: Sequence[Tensor], *, steps: int | None = None) -> Sequences:
    """Sequences (steps, features) of any lengths to one batch.

    Args:
        sequences: one or more.
        steps: T of the batch; None for the longest sequence. A session needs the T of its example.

    Raises:
        DataError: no sequences, an invalid one (see `check_sequence`), or one of more than `steps`.
    """
    if not sequences:
        raise DataError("a batch needs at least one sequence, got none")
    for number, sequence in enumerate(sequences):
        check_sequence(sequence, f"sequence {number}")
    lengths = torch.tensor([s.shape[0] for s in sequences])
    x = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    if steps is not None:
        if x.shape[1] > steps:
            raise DataError(f"a sequence of {x.shape[1]} steps for a batch of {steps}; cut it, or give more steps")
        x = torch.nn.functional.pad(x, (0, 0, 0, steps - x.shape[1]))
    return Sequences(x, lengths)


def trimmed(x: Sequences) -> Sequences:
    """A batch without the steps that are padding in every row."""
    longest = int(x.lengths.max()) if x.lengths.numel() else 0
    return Sequences(x.x[:, :longest].contiguous(), x.lengths)


def check_sequence(sequence: Tensor, name: str) -> None:
    """Check that a recurrent layer can read a sequence.

    Raises:
        DataError: a shape other than (steps, features), no step, or NaN or infinite values.
    """
    if sequence.dim() != 2 or 0 in sequence.shape:
        raise DataError(f"{name} has the shape {tuple(sequence.shape)}; expected (steps, features), neither of them 0")
    broken = ~sequence.isfinite().all(1)
    if broken.any():
        first = int(broken.nonzero()[0])
        raise DataError(f"{name} holds NaN or infinite values, first at step {first}; fill them in or leave it out")


def as_sequences(x: Tensor | Sequences, features: int) -> Sequences:
    """The input of a recurrent layer with lengths; all rows of a tensor (B, T, features) have length T.

    Raises:
        InputError: another shape, no step, or lengths that are not one per row and from 1 to T.
    """
    given = x.x if isinstance(x, Sequences) else x
    if given.dim() != 3 or given.shape[1] == 0 or given.shape[2] != features:
        raise InputError(
            f"sequences of shape {tuple(given.shape)}; expected (batch, steps, {features}) with at least one step"
        )
    return with_lengths(x)


def as_videos(x: Tensor | Sequences) -> Sequences:
    """Videos with lengths; all rows of a tensor (B, T, C, H, W) have length T.

    Raises:
        InputError: another shape, no frame, or lengths that are not one per row and from 1 to T.
    """
    given = x.x if isinstance(x, Sequences) else x
    if given.dim() != 5 or 0 in given.shape[1:]:
        raise InputError(f"videos of shape {tuple(given.shape)}; expected (batch, frames, C, H, W), none of them 0")
    return with_lengths(x)


def with_lengths(x: Tensor | Sequences) -> Sequences:
    """Sequences with lengths; all rows of a tensor (B, T, ...) have length T.

    Raises:
        InputError: lengths that are not one per row and from 1 to T.
    """
    if not isinstance(x, Sequences):
        return Sequences(x, torch.full((x.shape[0],), x.shape[1], device=x.device))
    given = x.x
    if x.lengths.shape != given.shape[:1] or x.lengths.is_floating_point():
        raise InputError(
            f"lengths of shape {tuple(x.lengths.shape)} and {x.lengths.dtype} for {given.shape[0]} sequences; expected "
            f"one whole number each"
        )
    if not torch.compiler.is_compiling() and x.lengths.numel():
        least, most = (int(n) for n in x.lengths.aminmax())
        if least < 1 or most > given.shape[1]:
            raise InputError(
                f"lengths from {least} to {most} in a batch of {given.shape[1]} steps; expected 1 to {given.shape[1]}"
            )
    return x
