"""Optimizer and scheduler factories, for `fit` to call once the model and the number of steps are known."""

from collections.abc import Callable

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

from dynanet.core.errors import ConfigError

OptimizerFactory = Callable[[nn.Module], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]  # with the number of optimizer steps of the whole run


def sgd(lr: float = 0.1, *, momentum: float = 0.9, weight_decay: float = 1e-4) -> OptimizerFactory:
    """SGD with Nesterov momentum, without weight decay of biases and norms."""
    return lambda model: SGD(_groups(model, weight_decay), lr=lr, momentum=momentum, nesterov=momentum > 0)


def adamw(lr: float = 1e-3, *, weight_decay: float = 0.05) -> OptimizerFactory:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), without weight decay of biases and norms."""
    return lambda model: AdamW(_groups(model, weight_decay), lr=lr)


def one_cycle(*, warmup: float = 0.25) -> SchedulerFactory:
    """From lr/25 up to lr over the share `warmup` of training, then down to nearly 0, both by cosines.

    Smith and Topin 2018, arXiv:1708.07120; momentum stays constant.
    """
    return lambda optimizer, steps: OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], steps, pct_start=warmup, cycle_momentum=False
    )


def cosine(*, warmup_steps: int = 0) -> SchedulerFactory:
    """Down to 0 by a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983), after an optional linear warm-up.

    Raises:
        ConfigError: when training begins, if the warm-up is as long as the run.
    """

    def make(optimizer: Optimizer, steps: int) -> LRScheduler:
        if warmup_steps >= steps:
            raise ConfigError(f"{warmup_steps} warm-up steps in a run of {steps}; warm up for less than the whole run")
        decay = CosineAnnealingLR(optimizer, steps - warmup_steps)
        if not warmup_steps:
            return decay
        return SequentialLR(optimizer, [LinearLR(optimizer, 0.01, 1.0, warmup_steps), decay], [warmup_steps])

    return make


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and kernels decay; biases, norms and other vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kernels = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() <= 1]
    groups = [{"params": kernels, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
