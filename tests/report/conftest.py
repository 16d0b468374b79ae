from collections.abc import Callable

import numpy as np
import pytest

from dynanet.calibrate.operating_point import OperatingPoint, choose
from dynanet.calibrate.table import ExitTable
from dynanet.core.budget import Budget

EXITS, CLASSES = 4, 5


@pytest.fixture(scope="session")
def draw() -> Callable[..., ExitTable]:
    """A table of n fresh samples whose classes differ in difficulty: class 0 is easy, the last one hard."""

    def table(seed: int, n: int = 400, ms: bool = True) -> ExitTable:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, CLASSES, n)
        margin = np.linspace(0.2, 1.6, EXITS) - 0.8 * (labels[:, None] - 2 + rng.normal(size=(n, 1)))
        margin = margin + 0.5 * rng.normal(size=(n, EXITS))
        correct = margin > 0
        return ExitTable(
            scores=(2 * margin + rng.normal(size=(n, EXITS)))[:, :-1],
            answers=np.where(correct, labels[:, None], (labels[:, None] + 1) % CLASSES),
            correct=correct,
            labels=labels,
            macs=np.array([1e6, 2e6, 4e6, 8e6]),
            ms=np.array([0.01, 0.015, 0.025, 0.05]) if ms else None,
        )

    return table


@pytest.fixture(scope="session")
def operating_points(draw: Callable[..., ExitTable]) -> list[OperatingPoint]:
    """Two budgets and a risk, chosen on held-out samples."""
    held_out = draw(1)
    return [choose(held_out, budget) for budget in (Budget(macs=4e6), Budget(macs=2e6), Budget(risk=0.1))]
