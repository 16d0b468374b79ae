"""Runs of any size train: any number of epochs, batches and samples from 1 up, with every scheduler."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from dynanet import train
from dynanet.core.errors import ConfigError
from dynanet.mechanisms.early_exit import EarlyExit
from tests.train.train_toys import data

SHARES = (0.0, 0.1, 0.25, 1 / 3, 0.5, 0.75, 0.99, 1.0)
FACTORIES = {f"one_cycle({w:.2f})": train.one_cycle(warmup=w) for w in SHARES} | {
    f"cosine({n})": train.cosine(warmup_steps=n) for n in range(3)
}


def small():
    torch.manual_seed(0)
    return EarlyExit([nn.Linear(8, 4), nn.Linear(4, 4)], [nn.Linear(4, 3), nn.Linear(4, 3)])


def rates(factory, steps):
    """The learning rates of a run whose highest is 1."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler, found = factory(optimizer, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("name", FACTORIES)
def test_a_schedule_has_a_rate_for_every_step_of_any_run(name):
    shortest = int(name[7]) + 1 if name.startswith("cosine") else 1
    for steps in range(shortest, 61):
        found = rates(FACTORIES[name], steps)
        assert all(0 <= rate <= 1 + 1e-9 for rate in found), (steps, found)
        assert max(found) >= 0.04 - 1e-9, f"{steps} steps train next to nothing: {found}"


def test_long_cycles_are_those_of_torch():
    for steps, warmup in product((10, 30, 50), (0.25, 0.3, 0.5)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, steps, pct_start=warmup, cycle_momentum=False)
        expected = []
        for _ in range(steps):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            theirs.step()
        assert rates(train.one_cycle(warmup=warmup), steps) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.sampled_from(sorted(FACTORIES)), st.integers(1, 3))
def test_small_runs_train(tmp_path_factory, epochs, samples, batch_size, name, accumulated):
    steps = epochs * math.ceil(math.ceil(samples / batch_size) / accumulated)
    if name.startswith("cosine") and int(name[7]) >= steps:
        return
    model = small()
    before = [weight.detach().clone() for weight in model.parameters()]
    done = train.fit(
        model,
        DataLoader(data(samples), batch_size, shuffle=True),
        DataLoader(data(samples), batch_size),
        objective=train.MultiExit(),
        epochs=epochs,
        scheduler=FACTORIES[name],
        folder=tmp_path_factory.mktemp("small"),
        checkpoint_every=1,
        progress=False,
        trainer_options={"accumulate_grad_batches": accumulated, "logger": False},
    )
    assert done.trainer.global_step == steps and done.best is not None
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"epochs": -1}, {"epochs": 1.5}, {"epochs": 1, "checkpoint_every": 0}], ids=str
)
def test_no_run_at_all_is_refused(tmp_path, options):
    with pytest.raises(ConfigError, match="must be"):
        train.fit(small(), train.Batches(data(), 5), objective=train.MultiExit(), folder=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "make",
    [lambda: train.one_cycle(warmup=-0.1), lambda: train.one_cycle(warmup=2), lambda: train.cosine(warmup_steps=-1)],
)
def test_warm_ups_that_mean_nothing(make):
    with pytest.raises(ConfigError, match="warmup"):
        make()
