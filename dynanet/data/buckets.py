"""Batches of sequences of similar lengths."""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from dynanet.data.ragged import SequenceSet
from dynanet.data.text import Sentences


class BucketedBatches(Dataset[list]):
    """A data set whose samples are batches: of sequences shuffled once, those of similar lengths together.

    Sequences are sorted by length within every ten batches, so that little is padded.

    Args:
        data: sequences or sentences.
        lengths: of its samples.
        batch: samples of a batch.
        seed: of the shuffling.
    """

    def __init__(self, data: SequenceSet | Sentences, lengths: Sequence[int], batch: int, seed: int) -> None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        chunks = [sorted(chunk.tolist(), key=lambda i: lengths[i]) for chunk in order.split(10 * batch)]
        self.data = data
        self.rows = [chunk[k : k + batch] for chunk in chunks for k in range(0, len(chunk), batch)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list:
        return [self.data[i] for i in self.rows[index]]

    def collate(self, samples: Sequence[list]) -> tuple:
        """The batch that is the only sample, padded."""
        return self.data.collate(samples[0])
