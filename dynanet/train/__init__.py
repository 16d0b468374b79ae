"""Training: objectives, schedules, and a run that goes on where it was killed.

What needs Lightning (`fit`, `Training`, `Run`, `Checkpoints`, `AtomicCheckpointIO`) is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynanet.train.batches import Batches
from dynanet.train.batchnorm import recalibrate_batchnorm
from dynanet.train.checkpoint import load_checkpoint, load_weights, newest, save_checkpoint
from dynanet.train.equilibrium import exits_reached, rescale_gradients
from dynanet.train.objectives import CrossEntropy, MultiExit, Objective, TargetRate, Within
from dynanet.train.optimizers import adamw, cosine, one_cycle, sgd
from dynanet.train.schedules import anneal_temperature, exponential, linear, tighten_budget

if TYPE_CHECKING:
    from dynanet.train.fitting import Run, fit
    from dynanet.train.lightning import Training
    from dynanet.train.saving import AtomicCheckpointIO, Checkpoints

__all__ = [
    "AtomicCheckpointIO",
    "Batches",
    "Checkpoints",
    "CrossEntropy",
    "MultiExit",
    "Objective",
    "Run",
    "TargetRate",
    "Training",
    "Within",
    "adamw",
    "anneal_temperature",
    "cosine",
    "exits_reached",
    "exponential",
    "fit",
    "linear",
    "load_checkpoint",
    "load_weights",
    "newest",
    "one_cycle",
    "recalibrate_batchnorm",
    "rescale_gradients",
    "save_checkpoint",
    "sgd",
    "tighten_budget",
]

_WITH_LIGHTNING = {
    "AtomicCheckpointIO": "dynanet.train.saving",
    "Checkpoints": "dynanet.train.saving",
    "Run": "dynanet.train.fitting",
    "Training": "dynanet.train.lightning",
    "fit": "dynanet.train.fitting",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_LIGHTNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WITH_LIGHTNING[name]), name)
