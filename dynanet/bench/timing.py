"""Timing in pairs: everything in one process, interleaved in random order, ratios per round."""

import random
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch


def paired(contestants: Mapping[str, Callable[[], object]], *, rounds: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Seconds of every contestant in every round, {name: (rounds,)}.

    Each round runs every contestant once, in random order, so that what disturbs the machine disturbs all. On one
    thread it is processor time, which other programs cannot inflate by taking the core away; on more, wall time.

    Args:
        contestants: what to run, by name. Each runs once before the first round.
        rounds: how often.
        seed: of the order.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    order, draw = list(contestants), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
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
    """How many times quicker: median of the per-round ratios, and their quartiles."""
    low, middle, high = np.quantile(slow / quick, [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)
