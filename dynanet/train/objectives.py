"""Objectives for any mechanism: cross-entropies, a budget, rates.

objective = MultiExit(distill=0.5) + 2.0 * BudgetPenalty(Budget(macs=0.5 * cost.full), cost)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.errors import BudgetError, ConfigError, StructureError
from dynanet.core.objective import Objective, check_exit_weights
from dynanet.core.trace import Trace


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy of the answer, for models that answer once.

    Args:
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2016, arXiv:1512.00567).

    Raises:
        ConfigError: label smoothing outside [0, 1).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Logits (B, C, ...) against classes (B, ...) or probabilities."""
        return functional.cross_entropy(answer, y, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class MultiExit(Objective):
    """The weighted sum of every exit's cross-entropy, with optional distillation from the last exit.

    With `distill`, every exit but the last also pays distill * T^2 * KL(last || exit), both softened by the temperature
    T, and no gradient reaches the teacher (Hinton et al. 2015, arXiv:1503.02531; one teacher for all exits as in Li et
    al. 2019, arXiv:1908.06294).

    Args:
        weights: one per exit; None for ones, as MSDNet (arXiv:1703.09844) trains.
        distill: weight of the distillation loss relative to the labels'.
        temperature: softens both sides of the distillation.
        label_smoothing: as in `CrossEntropy`.
        halt: the name of the Halt whose exits are trained; None where the model has only one.

    Raises:
        ConfigError: weights that are negative, not finite or all 0, a negative `distill`, a temperature that is not
            positive, label smoothing outside [0, 1).
    """

    weights: Sequence[float] | None = None
    _: KW_ONLY
    distill: float = 0.0
    temperature: float = 3.0
    label_smoothing: float = 0.0
    halt: str | None = None

    def __post_init__(self) -> None:
        _check_smoothing(self.label_smoothing)
        if not 0 <= self.distill < math.inf:
            raise ConfigError(f"distill must be finite and at least 0, got {self.distill}")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature must be finite and above 0, got {self.temperature}")
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(self.weights))
            check_exit_weights(self.weights)

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """Over the exits' logits (B, C) in the trace.

        Raises:
            StructureError: no Halt in the model, or several and none named, or exits that only some rows reached.
            ConfigError: not one weight per exit.
        """
        exits = trace.exits(y.shape[0], self.halt)
        weights = self.weights if self.weights is not None else (1.0,) * len(exits)
        if len(weights) != len(exits):
            raise ConfigError(f"MultiExit got {len(weights)} weights for {len(exits)} exits; give one weight per exit")
        losses = [functional.cross_entropy(e, y, label_smoothing=self.label_smoothing) for e in exits]
        if self.distill:
            teacher = (exits[-1].detach() / self.temperature).log_softmax(1)
            losses = [loss + self.distill * self._distilled(e, teacher) for loss, e in zip(losses, exits, strict=True)]
        return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()

    def _distilled(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """KL from the teacher per sample; 0 for the teacher itself, with a gradient of 0."""
        student = (logits / self.temperature).log_softmax(1)
        return self.temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


@dataclass(eq=False)  # not frozen: a schedule moves the limit
class BudgetPenalty(Objective):
    """The squared excess of the batch's mean cost over a budget, relative to the full model's cost.

    It is 0 within the budget. In training the cost is the expected one, so the gradient reaches every gate that decides
    about a unit; where no gate is trained (early exit, whose thresholds are calibrated afterwards) it is a constant.

    Args:
        budget: with `macs`, the mean per sample.
        cost: of this model.

    Attributes:
        full: MACs of the full model.
        macs: the limit in force, which `tighten_budget` changes.

    Raises:
        BudgetError: a budget without `macs`, or below the static part of the model.
    """

    budget: Budget
    cost: CostModel = field(repr=False)
    full: float = field(init=False)
    macs: float = field(init=False, repr=False)  # left out of the repr, which is the same at every step of a run

    def __post_init__(self) -> None:
        if self.budget.macs is None:
            raise BudgetError(f"a BudgetPenalty needs a budget in MACs, got {self.budget}; give Budget(macs=...)")
        if self.budget.macs < self.cost.always:
            raise BudgetError(
                f"a budget of {self.budget.macs:,.0f} MACs is below the {self.cost.always:,.0f} that always run; raise "
                f"it, or make less of the model static"
            )
        self.full = self.cost.full
        self.macs = self.budget.macs

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """((mean spent - limit) / full)^2 where positive."""
        excess = (self.cost.spent(trace).mean() - self.macs) / self.full
        penalty = excess.clamp(min=0).square()
        return penalty.to(answer.dtype) if isinstance(answer, Tensor) else penalty


@dataclass(frozen=True)
class TargetRate(Objective):
    """The sum over layers of (mean keep - rate)^2: every layer is to run for that share of the batch.

    Veit and Belongie 2018, ConvNet-AIG, arXiv:1711.11503: the loss on target rates.

    Args:
        rate: one for all layers, or by layer name; layers without one are free.

    Raises:
        ConfigError: a rate outside (0, 1].
    """

    rate: float | Mapping[str, float]

    def __post_init__(self) -> None:
        for value in self.rate.values() if isinstance(self.rate, Mapping) else (self.rate,):
            if not 0 < value <= 1:
                raise ConfigError(f"a target rate must be above 0 and at most 1, got {value}")
        if isinstance(self.rate, Mapping):
            object.__setattr__(self, "rate", dict(self.rate))

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the layers that decided, their calls and units averaged.

        Raises:
            StructureError: no layer decided, or one that was named did not.
        """
        rates = self.rate if isinstance(self.rate, Mapping) else dict.fromkeys(trace.keys(), self.rate)
        missing = set(rates) - set(trace.keys())
        if missing or not rates:
            raise StructureError(
                f"TargetRate found no decision of {sorted(missing) or 'any layer'} in the trace, only {trace.keys()}"
            )
        misses = [torch.stack([k.mean() for k in trace[name]]).mean() - rate for name, rate in rates.items()]
        return torch.stack(misses).square().sum()


def _check_smoothing(share: float) -> None:
    if not 0 <= share < 1:
        raise ConfigError(f"label_smoothing must be at least 0 and below 1, got {share}")
