import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from dynanet import train
from dynanet.core.errors import ConfigError
from dynanet.train import batches
from dynanet.train.seeds import seed_all, seeded
from tests.train.train_toys import data


class Draws(Dataset):
    """Every sample draws from all three generators."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own():
    loader = train.Batches(Draws(), 4, shuffle=True)
    orders = [torch.cat(list(loader))[:, 0].tolist() for _ in range(3)]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    plain = train.Batches(Draws(), 4)
    assert torch.cat(list(plain))[:, 0].tolist() == torch.cat(list(plain))[:, 0].tolist() == list(range(11))
    assert [len(b) for b in train.Batches(Draws(), 4, drop_last=True)] == [4, 4]


def test_what_a_sample_draws_depends_on_its_place_only():
    one = list(train.Batches(Draws(), 4, shuffle=True))
    seed_all(123)
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(one, train.Batches(Draws(), 4, shuffle=True, workers=2), strict=True))
    assert not torch.equal(one[0], next(iter(train.Batches(Draws(), 4, shuffle=True, seed=1))))
    assert len(torch.cat(one)[:, 1:].unique()) == 33


def test_reading_batches_leaves_the_global_generators_alone():
    seed_all(5)
    expected = draws()
    seed_all(5)
    list(train.Batches(Draws(), 4, shuffle=True))
    assert draws() == expected
    with seeded(5):
        assert draws() == expected
        np.random.seed(1)
    seed_all(5)
    assert draws() == expected


@pytest.mark.parametrize("samples", [24, 22, 3])
def test_processes_share_the_batch_that_one_would_make(monkeypatch, samples):
    alone = train.Batches(data(samples), 6, shuffle=True)
    expected = [plan.indices for plan in alone.plan(epoch=1)]
    monkeypatch.setattr(batches, "_world", lambda: 3)
    shared = train.Batches(data(samples), 2, shuffle=True)
    plans = []
    for rank in range(3):
        monkeypatch.setattr(batches, "_rank", lambda rank=rank: rank)
        plans.append(shared.plan(epoch=1))
    assert {len(plan) for plan in plans} == {len(expected)} and all(len(p.indices) == 2 for plan in plans for p in plan)
    assert len({p.seed for plan in plans for p in plan}) == 3 * len(expected)
    for batch, indices in enumerate(expected):
        together = [i for plan in plans for i in plan[batch].indices]
        assert set(indices) <= set(together)
        assert len(indices) < 6 or sorted(indices) == sorted(together)


def test_a_dataloader_is_read_as_its_parts():
    loader = DataLoader(data(), 5, shuffle=True, drop_last=True)
    read = train.Batches.of(loader, seed=3)
    assert repr(read) == "Batches(22 samples, 5 x 1, shuffle=True, seed=3, drop_last=True)"
    assert train.Batches.of(read) is read and not train.Batches.of(DataLoader(data(), 5)).shuffle


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    "loader, message",
    [
        (DataLoader(Stream(), 2), "map-style dataset; got DataLoader"),
        ([1, 2], "got list"),
        (DataLoader(data(), sampler=WeightedRandomSampler([1.0] * 22, 22)), "WeightedRandomSampler, which cannot be"),
    ],
)
def test_what_cannot_be_resumed_is_refused(loader, message):
    with pytest.raises(ConfigError, match=message):
        train.Batches.of(loader)


def test_no_batch_at_all():
    for wrong in ({"batch_size": 0}, {"batch_size": 50, "drop_last": True}):
        with pytest.raises(ConfigError, match="come to none"):
            train.Batches(data(), **wrong)
