"""Training: objectives, schedules, and a run that goes on where it was killed.

What needs Lightning (`fit`, `TrainingModule`, `FitResult`, `Frozen`, `Checkpoints`, `AtomicCheckpointIO`) is imported
when it is first used.
"""
# ruff: noqa: F401  (the public names)

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynanet.core.objective import Objective
from dynanet.train.balance import LoadBalance, RouterZ, load_variation
from dynanet.train.batches import Batches
from dynanet.train.batchnorm import recalibrate_batchnorm
from dynanet.train.checkpoint import load_checkpoint, load_weights, newest, save_checkpoint
from dynanet.train.collapse import CollapseAlarm, collapsed, loads
from dynanet.train.equilibrium import exits_reached, rescale_gradients
from dynanet.train.objectives import BudgetPenalty, CrossEntropy, MultiExit, TargetRate
from dynanet.train.optimizers import adamw, cosine, one_cycle, sgd
from dynanet.train.reinforce import (
    CostReward,
    DropReward,
    Reinforce,
    Reward,
    SkipReward,
    deployed_reward,
    sample_gates,
    sampled,
    surrogate,
)  # fmt: skip
from dynanet.train.schedules import anneal_temperature, exponential, linear, tighten_budget

if TYPE_CHECKING:
    from dynanet.train.fitting import FitResult, fit
    from dynanet.train.freezing import Frozen
    from dynanet.train.lightning import TrainingModule
    from dynanet.train.saving import AtomicCheckpointIO, Checkpoints

_WITH_LIGHTNING = {
    "AtomicCheckpointIO": "dynanet.train.saving",
    "Checkpoints": "dynanet.train.saving",
    "Frozen": "dynanet.train.freezing",
    "FitResult": "dynanet.train.fitting",
    "TrainingModule": "dynanet.train.lightning",
    "fit": "dynanet.train.fitting",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_LIGHTNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WITH_LIGHTNING[name]), name)
