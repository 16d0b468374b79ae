"""What the sets of labelled sequences share: standardisation, and batches of similar lengths."""

import torch

from dynanet.core.errors import DataError
from dynanet.data.buckets import BucketedBatches
from dynanet.data.deviations import warn_of_constants
from dynanet.data.labels import check_parts
from dynanet.data.ragged import SequenceSet
from dynanet.datamodules.inputs import SequenceInputs
from dynanet.datamodules.module import Opened
from dynanet.train.batches import Batches


def labelled_sequences(
    title: str, train: SequenceSet, held_out: SequenceSet, test: SequenceSet, *, batch: int, seed: int
) -> Opened:
    """Sequences with a class each, every feature standardised by the training part.

    Args:
        title: of the data.
        train: training sequences.
        held_out: for calibration.
        test: for the final figures.
        batch: training samples per step.
        seed: of the order.

    Raises:
        DataError: a part has other classes, another number of features or another sample rate than training.
    """
    check_parts(train.classes, {"held-out": (held_out.classes, held_out.labels), "test": (test.classes, test.labels)})
    for part in (held_out, test):
        if part.features != train.features:
            raise DataError(f"training has {train.features} features and another part {part.features}; give it as many")
        if part.rate != train.rate:
            raise DataError(f"training has {train.rate} samples per second and another part {part.rate}; convert it")
    mean, std = train.statistics()
    steps, *others = (torch.cat(part.sequences) for part in (train, held_out, test))
    warn_of_constants(steps, dict(zip(("held-out", "test"), others, strict=True)))
    train, held_out, test = (part.standardized(mean, std) for part in (train, held_out, test))
    buckets = BucketedBatches(train, [len(sequence) for sequence in train.sequences], batch, seed)
    longest = max(part.longest for part in (train, held_out, test))
    return Opened(
        title=title,
        classes=train.classes,
        inputs=SequenceInputs(train.features, longest, tuple(mean.tolist()), tuple(std.tolist()), train.rate),
        train=Batches(buckets, 1, shuffle=True, seed=seed, collate=buckets.collate),
        held_out=Batches(held_out, 256, collate=SequenceSet.collate),
        test=Batches(test, 256, collate=SequenceSet.collate),
    )
