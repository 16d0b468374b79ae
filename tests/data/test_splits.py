"""Rows are held out in proportion, and a split is found by any of its names."""

import pytest
import torch

from dynanet.core.errors import DataError
from dynanet.data.splits import SAME_SPLIT, dealt, synonyms

LABELS = torch.arange(60) % 3


@pytest.mark.parametrize(("held_out", "count"), [(None, 6), (1, 1), (30, 30), (59, 59)])
def test_every_row_is_either_trained_with_or_held_out(held_out, count):
    rest, held = dealt(LABELS, held_out, seed=0)
    assert len(held) == count
    assert torch.cat([rest, held]).sort().values.tolist() == list(range(60))
    shares = LABELS[held].bincount(minlength=3)
    assert shares.max() - shares.min() <= (count % 3 > 0)


def test_a_seed_holds_the_same_rows_out_and_another_seed_others():
    first, again, other = (dealt(LABELS, None, seed)[1] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_of_few_rows_one_is_held_out():
    assert [len(part) for part in dealt(torch.tensor([0, 1, 0]), None, seed=0)] == [2, 1]


@pytest.mark.parametrize("held_out", [0, -1, 60, 61])
def test_neither_part_may_be_empty(held_out):
    with pytest.raises(DataError, match=f"cannot hold out {held_out} of 60; give a number from 1 to 59"):
        dealt(LABELS, held_out, seed=0)


def test_one_row_cannot_be_divided():
    with pytest.raises(DataError, match="cannot hold out 1 of 1"):
        dealt(torch.tensor([0]), None, seed=0)


@pytest.mark.parametrize("split", [name for names in SAME_SPLIT for name in names])
def test_synonyms_are_the_same_whichever_is_asked_for(split):
    names = synonyms(split)
    assert names[0] == split and len(set(names)) == len(names)
    assert all(set(synonyms(name)) == set(names) for name in names)
