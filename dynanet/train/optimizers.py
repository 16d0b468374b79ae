"""Optimizer and scheduler factories, for `fit` to call once the model and the number of steps are known."""

from collections.abc import Callable

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

from dynanet.core.errors import ConfigError, check_shares, check_sizes

OptimizerFactory = Callable[[nn.Module], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]  # with the number of optimizer steps of the whole run

_STEP = 1e-6  # of a step: lengths that differ by less are the same


def sgd(lr: float = 0.1, *, momentum: float = 0.9, weight_decay: float = 1e-4) -> OptimizerFactory:
    """SGD with Nesterov momentum, without weight decay of biases and norms."""
    return lambda model: SGD(_groups(model, weight_decay), lr=lr, momentum=momentum, nesterov=momentum > 0)


def adamw(lr: float = 1e-3, *, weight_decay: float = 0.05) -> OptimizerFactory:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), without weight decay of biases and norms."""
    return lambda model: AdamW(_groups(model, weight_decay), lr=lr)


def one_cycle(*, warmup: float = 0.25) -> SchedulerFactory:
    """From lr/25 up to lr over the share `warmup` of training, then down to nearly 0, both by cosines.

    Smith and Topin 2018, arXiv:1708.07120; momentum stays constant. A warm-up of at most one step begins at its top,
    and a run of one step takes it on the way down: the end of the cycle would train nothing.

    Raises:
        ConfigError: a warm-up below 0 or above 1.
    """
    check_shares(warmup=warmup)

    def make(optimizer: Optimizer, steps: int) -> LRScheduler:
        check_sizes(steps=steps)
        # torch divides by the length of each half, which it counts from the first step: both must be longer than 0
        total = steps + 1 if steps == 1 or warmup == 1 else steps
        rising = warmup * steps
        if abs(rising - 1) < _STEP:
            rising = 1 - _STEP
        tops = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, tops, total, pct_start=rising / total, cycle_momentum=False)

    return make


def cosine(*, warmup_steps: int = 0) -> SchedulerFactory:
    """Down to 0 by a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983), after an optional linear warm-up.

    Raises:
        ConfigError: a negative warm-up; when training begins, a warm-up as long as the run.
    """
    check_sizes(0, warmup_steps=warmup_steps)

    def make(optimizer: Optimizer, steps: int) -> LRScheduler:
        check_sizes(steps=steps)
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
