"""Batches of similar lengths."""

import torch

from dynanet.data.buckets import BucketedBatches
from dynanet.data.ragged import SequenceSet


def test_batches_are_of_similar_lengths_and_every_sample_comes_once():
    data = SequenceSet([torch.randn(n % 9 + 1, 2) for n in range(50)], torch.arange(50), "classes")
    lengths = [len(s) for s in data.sequences]
    bunches = BucketedBatches(data, lengths, 4, seed=0)
    batches = [bunches.collate([bunches[i]]) for i in range(len(bunches))]
    assert sorted(int(label) for _, y in batches for label in y) == list(range(50))
    padding = sum(int((x.lengths.max() - x.lengths).sum()) for x, _ in batches)
    assert padding < 0.2 * sum(lengths)
