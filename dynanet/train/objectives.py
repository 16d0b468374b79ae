"""Objectives for any mechanism: cross-entropies, a budget, rates.

objective = MultiExit(distill=0.5) + 2.0 * BudgetPenalty(Budget(macs=0.5 * cost.full), cost)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.errors import BudgetError, ConfigError, StructureError
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace


class CrossEntropy(Objective):
    """Cross-entropy of the answer, for models that answer once.

    Args:
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2016, arXiv:1512.00567).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        _check_smoothing(label_smoothing)
        self.label_smoothing = label_smoothing

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Logits (B, C, ...) against classes (B, ...) or probabilities."""
        return functional.cross_entropy(answer, y, label_smoothing=self.label_smoothing)

    def __repr__(self) -> str:
        return f"CrossEntropy({self.label_smoothing:g})"


class MultiExit(Objective):
    """The weighted sum of every exit's cross-entropy; the last exit may teach the others.

    With `distill`, every exit but the last also pays distill * T^2 * KL(last || exit), both softened by the temperature
    T, and no gradient reaches the teacher (Hinton et al. 2015, arXiv:1503.02531; one teacher for all exits as in Li et
    al. 2019, arXiv:1908.06294).

    Args:
        weights: one per exit; None for ones, as MSDNet (arXiv:1703.09844) trains.
        distill: how much the last exit's opinion counts beside the labels.
        temperature: softens both sides of the distillation.
        label_smoothing: as in `CrossEntropy`.
        halt: the name of the Halt whose exits are meant; None where the model has only one.
    """

    def __init__(
        self,
        weights: Sequence[float] | None = None,
        *,
        distill: float = 0.0,
        temperature: float = 3.0,
        label_smoothing: float = 0.0,
        halt: str | None = None,
    ) -> None:
        _check_smoothing(label_smoothing)
        if not distill >= 0 or not temperature > 0:
            raise ConfigError(
                f"MultiExit got distill = {distill} and a temperature of {temperature}; give 0 or more, and a number "
                f"above 0"
            )
        self.weights = None if weights is None else tuple(weights)
        self.distill, self.temperature = distill, temperature
        self.label_smoothing, self.halt = label_smoothing, halt

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """Over the exits' logits (B, C) in the trace.

        Raises:
            StructureError: no Halt in the model, or several and none named, or exits that only some rows reached.
            ConfigError: not one weight per exit.
        """
        exits = exit_answers(trace, self.halt)
        weights = self.weights if self.weights is not None else (1.0,) * len(exits)
        if len(weights) != len(exits):
            raise ConfigError(f"MultiExit got {len(weights)} weights for {len(exits)} exits; give one weight per exit")
        for k, logits in enumerate(exits):
            if logits.shape[0] != y.shape[0]:
                raise StructureError(
                    f"exit {k} answered {logits.shape[0]} of {y.shape[0]} rows; losses need every row: use train mode, "
                    f"or the dense form (`execute(model, sparse=False)`)"
                )
        losses = [functional.cross_entropy(e, y, label_smoothing=self.label_smoothing) for e in exits]
        if self.distill:
            teacher = (exits[-1].detach() / self.temperature).log_softmax(1)
            losses = [loss + self.distill * self._taught(e, teacher) for loss, e in zip(losses, exits, strict=True)]
        return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()

    def _taught(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """KL from the teacher per sample; 0 for the teacher itself, up to a gradient that is 0 too."""
        student = (logits / self.temperature).log_softmax(1)
        return self.temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def __repr__(self) -> str:
        return (
            f"MultiExit({self.weights}, distill={self.distill:g}, temperature={self.temperature:g}, "
            f"label_smoothing={self.label_smoothing:g}, halt={self.halt!r})"
        )


class BudgetPenalty(Objective):
    """The squared excess of the batch's mean cost over a budget, relative to the full model's cost.

    It is 0 within the budget. In training the cost is the expected one, so the gradient reaches every gate that a unit
    hung on; where no gate learns (early exit, whose thresholds are found afterwards) it is a constant.

    Args:
        budget: with `macs`, the mean per sample.
        cost: of this model.

    Attributes:
        macs: the limit in force, which a schedule may change.

    Raises:
        BudgetError: a budget without `macs`, or below what runs whatever is decided.
    """

    def __init__(self, budget: Budget, cost: CostModel) -> None:
        if budget.macs is None:
            raise BudgetError(f"training can keep a budget in MACs only, and this is {budget}; give Budget(macs=...)")
        if budget.macs < cost.always:
            raise BudgetError(
                f"a budget of {budget.macs:,.0f} MACs is below the {cost.always:,.0f} that always run; ask for more, "
                f"or make less of the model static"
            )
        self.budget, self.cost, self.macs = budget, cost, budget.macs

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """((mean spent - limit) / full)^2 where positive."""
        excess = (self.cost.spent(trace).mean() - self.macs) / self.cost.full
        penalty = excess.clamp(min=0).square()
        return penalty.to(answer.dtype) if isinstance(answer, Tensor) else penalty

    def __repr__(self) -> str:
        return f"BudgetPenalty({self.budget!r}, full={self.cost.full:.0f})"


class TargetRate(Objective):
    """The sum over layers of (mean keep - rate)^2: every layer is to run for that share of the batch.

    Veit and Belongie 2018, ConvNet-AIG, arXiv:1711.11503: the loss on target rates.

    Args:
        rate: one for all layers, or by layer name; layers without one are free.

    Raises:
        ConfigError: a rate outside (0, 1].
    """

    def __init__(self, rate: float | Mapping[str, float]) -> None:
        for value in rate.values() if isinstance(rate, Mapping) else (rate,):
            if not 0 < value <= 1:
                raise ConfigError(f"a target rate of {value} is no share of rows to keep; give one above 0, at most 1")
        self.rate = dict(rate) if isinstance(rate, Mapping) else rate

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the layers heard, their calls and units averaged.

        Raises:
            StructureError: no layer decided, or one that was named did not.
        """
        rates = self.rate if isinstance(self.rate, dict) else dict.fromkeys(trace.keys(), self.rate)
        silent = set(rates) - set(trace.keys())
        if silent or not rates:
            raise StructureError(
                f"no decision of {sorted(silent) or 'any layer'} to bring to a rate; this pass heard {trace.keys()}"
            )
        misses = [torch.stack([k.mean() for k in trace[name]]).mean() - rate for name, rate in rates.items()]
        return torch.stack(misses).square().sum()

    def __repr__(self) -> str:
        return f"TargetRate({self.rate})"


def exit_answers(trace: Trace, halt: str | None = None) -> list[Any]:
    """The answers of every exit of a Halt.

    Args:
        trace: of a pass.
        halt: the Halt's name; None where there is only one.

    Raises:
        StructureError: there is none, or several and none named.
    """
    if halt is None and len(trace.answers) == 1:
        return next(iter(trace.answers.values()))
    if halt is None or halt not in trace.answers:
        raise StructureError(
            f"exits of {'one Halt' if halt is None else repr(halt)} were expected and those of {sorted(trace.answers)} "
            f"answered; name one of these, or use train.CrossEntropy for a model without exits"
        )
    return trace.answers[halt]


def _check_smoothing(share: float) -> None:
    if not 0 <= share < 1:
        raise ConfigError(f"label_smoothing is {share}; give a share from 0 to below 1")
