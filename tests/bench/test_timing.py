"""Timing in pairs finds the ratio that is there, whatever happens to the machine meanwhile."""

import time

import numpy as np
import pytest
import torch

from dynanet.bench.timing import paired, ratio


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def work(turns: int):
    return lambda: sum(i * i for i in range(20_000 * turns))  # in this thread: several would wait for a busy machine


def test_every_round_runs_everybody_once_in_an_order_of_its_own():
    ran: list[str] = []
    seconds = paired({name: lambda name=name: ran.append(name) for name in "abcd"}, rounds=20)
    assert list(seconds) == list("abcd") and all(times.shape == (20,) for times in seconds.values())
    assert ran[:4] == list("abcd")  # warming up
    rounds = [tuple(ran[i : i + 4]) for i in range(4, len(ran), 4)]
    assert len(rounds) == 20 and all(sorted(each) == list("abcd") for each in rounds) and len(set(rounds)) > 5
    again: list[str] = []
    paired({name: lambda name=name: again.append(name) for name in "abcd"}, rounds=20)
    assert again == ran
    other: list[str] = []
    paired({name: lambda name=name: other.append(name) for name in "abcd"}, rounds=20, seed=1)
    assert other != ran


def test_three_times_the_work_takes_about_three_times_as_long(threads):
    seconds = paired({"quick": work(1), "slow": work(3)}, rounds=15)
    middle, low, high = ratio(seconds["slow"], seconds["quick"])
    assert low <= middle <= high
    assert 2 < middle < 4.5 if threads == 1 else 1.5 < middle < 8  # wall time: the machine may be busy


def test_on_one_thread_waiting_costs_nothing():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = paired({"waiting": lambda: time.sleep(0.05)}, rounds=2)
    finally:
        torch.set_num_threads(before)
    assert seconds["waiting"].max() < 0.03


def test_ratios_are_taken_round_by_round():
    quick = np.array([1.0, 2.0, 10.0, 1.0, 1.0])  # the machine was disturbed in the third round
    assert ratio(3 * quick, quick) == pytest.approx((3.0, 3.0, 3.0))
    slow = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert ratio(slow, np.ones(5)) == pytest.approx((3.0, 2.0, 4.0))
