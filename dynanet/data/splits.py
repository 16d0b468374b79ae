"""Parts of a labelled set that do not leak: held out from training, stratified; and the names that splits go by."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dynanet.core.errors import ConfigError, DataError
from dynanet.data.images import Images, ImageTensors, Transform, to_float

SAME_SPLIT = (  # the Hugging Face hub's synonyms (docs: "Structure your repository")
    ("train", "training"),
    ("val", "validation", "valid", "dev"),
    ("test", "testing", "eval", "evaluation"),
)

ImageSet = TypeVar("ImageSet", Images, ImageTensors)


def hold_out(data: ImageSet, count: int, *, seed: int, transform: Transform | None = None) -> tuple[ImageSet, ImageSet]:
    """Carve a held-out part out of a training set: stratified, disjoint, the same for the same seed.

    Thresholds and budgets are fitted on such a part, so it must not be augmented: the training set's own transform,
    unless it is plain `to_float`, is not carried over.

    Args:
        data: the training set.
        count: how many images to hold out.
        seed: which ones.
        transform: of the held-out part. Needed when `data` has one of its own, which may be random.

    Returns:
        What is left to train on, and the held-out part.

    Raises:
        ConfigError: `count` leaves one of the two empty, or `data` has a transform and none is given for the part.
    """
    if not 0 < count < len(data):
        raise ConfigError(f"cannot hold out {count} of {len(data)} images; give a count from 1 to {len(data) - 1}")
    if transform is None and data.transform is not to_float:
        raise ConfigError(
            "the training set has a transform of its own, which may be random, and held-out images must not be "
            "augmented; give hold_out(transform=...), say data.images.to_float"
        )
    rest, held = stratified(data.labels, (len(data) - count, count), seed)
    return data.part(rest), data.part(held, transform)


def stratified(labels: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Deal rows into parts so that every part has every class in proportion.

    Part by part, each class gives its share of what is left, rounded so that the part has its size: the first part is
    off by less than one row per class, the others by less than two. The draw uses numpy's legacy generator: its stream
    is frozen, so a seed means the same rows for ever.

    Args:
        labels: (N,) the class of every row.
        sizes: how many rows each part gets; they sum to N.
        seed: which ones.

    Returns:
        Per part its row numbers, int64, ascending. They are disjoint and cover all rows.
    """
    assert sum(sizes) == len(labels), "the parts must cover the rows"
    draw = np.random.RandomState(seed)
    kinds = labels.unique().tolist()
    left = [draw.permutation(np.flatnonzero(labels.numpy() == kind)) for kind in kinds]
    parts = []
    for size in sizes:
        have = np.array([len(rows) for rows in left])
        fair = have * size / max(have.sum(), 1)
        take = np.floor(fair).astype(int)
        by_remainder = np.lexsort((draw.permutation(len(kinds)), take - fair))  # ties are drawn
        take[by_remainder[: size - take.sum()]] += 1
        parts.append(np.sort(np.concatenate([rows[:k] for rows, k in zip(left, take, strict=True)])))
        left = [rows[k:] for rows, k in zip(left, take, strict=True)]
    return [torch.from_numpy(rows) for rows in parts]


def dealt(labels: Tensor, held_out: int | None, seed: int) -> list[Tensor]:
    """Rows to train with and rows to hold out, every class in proportion.

    Args:
        labels: (N,) the class of every row.
        held_out: rows to hold out; None: a tenth.
        seed: draws them.

    Raises:
        DataError: no row is left to train with, or none held out.
    """
    count = max(1, len(labels) // 10) if held_out is None else held_out
    if not 0 < count < len(labels):
        raise DataError(f"cannot hold out {count} of {len(labels)}; give a number from 1 to {len(labels) - 1}")
    return stratified(labels, [len(labels) - count, count], seed)


def synonyms(split: str) -> tuple[str, ...]:
    """The names that a split goes by, the given one first: "val" is also "validation", "valid", "dev"."""
    family = next((names for names in SAME_SPLIT if split in names), ())
    return (split, *(name for name in family if name != split))
