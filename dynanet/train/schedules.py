"""Schedules: settings as pure functions of the training progress, so that a checkpoint need not save them.

anneal = anneal_temperature(model, exponential(5.0, 0.5))
tighten = tighten_budget(penalty, share=0.5)
fit(model, batches, ..., schedules=[anneal, tighten])      # or call them in your own loop: anneal(step / steps)
"""

from collections.abc import Callable

from torch import nn

from dynanet.core.errors import ConfigError
from dynanet.train.objectives import BudgetPenalty

Schedule = Callable[[float], float]  # from progress in [0, 1] to a value
Setting = Callable[[float], None]  # sets something to its value at a progress in [0, 1]


def linear(start: float, end: float, *, share: float = 1.0) -> Schedule:
    """From start to end in a straight line over the first `share` of training, then constant.

    >>> linear(1.0, 0.0, share=0.5)(0.25)
    0.5
    """
    _check_share(share)
    return lambda progress: start + (end - start) * min(progress / share, 1.0)


def exponential(start: float, end: float, *, share: float = 1.0) -> Schedule:
    """From start to end by equal factors over the first `share` of training, then constant. Both positive.

    >>> exponential(4.0, 1.0)(0.5)
    2.0
    """
    _check_share(share)
    if not (start > 0 and end > 0):
        raise ConfigError(f"both ends of an exponential schedule must be above 0, got {start} and {end}")
    return lambda progress: start * (end / start) ** min(progress / share, 1.0)


def anneal_temperature(model: nn.Module, schedule: Schedule) -> Setting:
    """Set the `temperature` of every rule of the model (`Gumbel`, `StraightThrough`, `Sigmoid`).

    Raises:
        ConfigError: the model has no such rule.
    """
    rules = [module for module in model.modules() if isinstance(vars(module).get("temperature"), int | float)]
    if not rules:
        raise ConfigError("no rule of this model has a temperature to anneal; use Gumbel, StraightThrough or Sigmoid")

    def set_temperature(progress: float) -> None:
        for rule in rules:
            vars(rule)["temperature"] = schedule(progress)

    return set_temperature


def tighten_budget(penalty: BudgetPenalty, *, share: float = 0.5) -> Setting:
    """Lower the limit of a penalty from the full model's cost to its budget over the first `share` of training."""
    macs = penalty.macs
    schedule = linear(max(penalty.full, macs), macs, share=share)

    def set_limit(progress: float) -> None:
        penalty.macs = schedule(progress)

    return set_limit


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ConfigError(f"share must be above 0 and at most 1, got {share}")
