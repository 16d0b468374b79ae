"""A tiny model with every kind of randomness and state, and data for it."""

import torch
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from dynanet import train
from dynanet.core.cost import CostModel
from dynanet.core.gate import Gate
from dynanet.gates.rules import Gumbel
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip


def toy(seed: int = 0, width: int = 16) -> EarlyExit:
    """Two stages with exits: BatchNorm, dropout, and a gate that samples."""
    torch.manual_seed(seed)
    first = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2))
    branch = LayerSkip(nn.Sequential(nn.Linear(width, width), nn.ReLU()), Gate(nn.Linear(width, 1), Gumbel()))
    return EarlyExit([first, branch], [nn.Linear(width, 3), nn.Linear(width, 3)])


def data(samples: int = 22, seed: int = 1) -> TensorDataset:
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(1))


def noisy(samples):
    """A collate with augmentation from the global generator."""
    x, y = default_collate(samples)
    return x + 0.1 * torch.randn_like(x), y


def run(folder, *, model=None, samples=22, epochs=3, held_out=True, **options) -> train.FitResult:
    """The run that tests kill, resume and compare."""
    model = model if model is not None else toy()
    cost = CostModel(model, torch.zeros(1, 8))
    within = train.BudgetPenalty(_budget(cost), cost)
    return train.fit(
        model,
        train.Batches(data(samples), 5, shuffle=True, collate=noisy),
        train.Batches(data(10, seed=2), 5) if held_out else None,
        objective=train.MultiExit(distill=0.5) + 2.0 * within,
        schedules=[
            train.anneal_temperature(model, train.exponential(5.0, 0.5)),
            train.tighten_budget(within),
        ],
        epochs=epochs,
        folder=folder,
        **{"progress": False, **options},
    )


def _budget(cost):
    from dynanet.core.budget import Budget

    return Budget(macs=0.6 * cost.full)
