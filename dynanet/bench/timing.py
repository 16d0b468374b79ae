"""Timing in pairs: everything in one process, interleaved in random order, ratios per round."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


def paired(contestants: Mapping[Any, Callable[[], object]], *, rounds: int, seed: int = 0) -> dict[Any, np.ndarray]:
    """Time contestants in pairs.

    Each round runs every contestant once, in random order, so that a disturbance of the machine affects all. On one
    thread it is processor time, which other programs cannot inflate by taking the core away; on more, wall time.

    Args:
        contestants: callables by name. Each runs once before the first round.
        rounds: number of timed rounds.
        seed: of the order.

    Returns:
        Seconds in every round, {name: (rounds,)}.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    order = list(contestants)
    draw = random.Random(seed)
    seconds: dict[Any, list[float]] = {name: [] for name in contestants}
    for name in order:
        contestants[name]()
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            start = clock()
            contestants[name]()
            seconds[name].append(clock() - start)
    return {name: np.array(times) for name, times in seconds.items()}


def ratio(slow: np.ndarray, quick: np.ndarray) -> tuple[float, float, float]:
    """Return the median and the quartiles of the per-round speed-ups."""
    low, middle, high = np.quantile(slow / quick, [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)
