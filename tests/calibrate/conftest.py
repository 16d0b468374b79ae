from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynanet.calibrate.table import ExitTable
from dynanet.core.decision import Decision
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip


@pytest.fixture
def draw() -> Callable[..., ExitTable]:
    """A table of n fresh samples of one population: later exits know more, scores know roughly what is right."""

    def table(seed: int, n: int, exits: int = 5, ties: int | None = None) -> ExitTable:
        rng = np.random.default_rng(seed)
        hardness = 2 * rng.normal(size=(n, 1))
        noise = rng.normal(size=(n, exits)).cumsum(1) / np.sqrt(np.arange(1, exits + 1))
        margin = np.linspace(-0.5, 2.5, exits) - 0.8 * hardness + 0.7 * noise
        scores = (0.7 * margin + 0.6 * rng.normal(size=(n, exits)))[:, :-1]
        if ties is not None:
            scores = np.round(scores * ties) / ties
        correct = margin > 0
        return ExitTable(
            scores=scores.astype(np.float32),
            answers=correct.astype(np.int64),
            correct=correct,
            labels=np.ones(n),
            macs=1e6 * np.arange(1, exits + 1) ** 1.2,
        )

    return table


class Sign(nn.Module):
    """A gate for tests: keeps a row where its mean is positive."""

    def forward(self, x: Tensor) -> Decision:
        score = x.mean(-1, keepdim=True)
        return Decision((score > 0).to(score.dtype), score)


@pytest.fixture
def plain() -> EarlyExit:
    """Four exits, the same cost for every sample."""
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(6, 6 + 2 * k), nn.Tanh(), nn.Linear(6 + 2 * k, 6), nn.Tanh()) for k in range(4)]
    return EarlyExit(stages, [nn.Linear(6, 3) for _ in range(4)])


@pytest.fixture
def nested() -> nn.Sequential:
    """Three exits behind a stem; in the steps, layers that skip for some samples: the cost depends on the sample."""
    torch.manual_seed(1)
    steps = [nn.Sequential(nn.Linear(6, 6), LayerSkip(nn.Linear(6, 6), Sign())) for _ in range(3)]
    return nn.Sequential(nn.Linear(6, 6), EarlyExit(steps, [nn.Linear(6, 3) for _ in range(3)]))


@pytest.fixture
def held_out() -> list[tuple[Tensor, Tensor]]:
    """Three batches of unequal size, 150 samples."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(150, 6, generator=generator), torch.randint(3, (150,), generator=generator)
    return list(zip(x.split([64, 64, 22]), y.split([64, 64, 22]), strict=True))
