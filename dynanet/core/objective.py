"""An Objective says what training wants: `objective(answer, y, trace) -> loss`. Objectives add and scale.

    objective = CrossEntropy() + 2.0 * BudgetPenalty(Budget(macs=0.5 * cost.full), cost)

It lies in core because mechanisms bring terms of their own: a ponder cost, a balance of branches.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynanet.core.errors import ConfigError
from dynanet.core.trace import Trace


class Objective(ABC):
    """A loss of an answer, its labels, and the decisions that led to it.

    Its repr tells all its settings: `resume` compares it with that of the run it goes on with.
    """

    @abstractmethod
    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The loss, a scalar.

        Args:
            answer: what the model answered.
            y: labels.
            trace: of the pass that gave the answer.
        """

    @property
    def parts(self) -> "tuple[tuple[float, Objective], ...]":
        """What this is the sum of: (weight, objective)."""
        return ((1.0, self),)

    def __add__(self, other: "Objective") -> "Weighted":
        return Weighted(self.parts + other.parts)

    def __mul__(self, weight: float) -> "Weighted":
        return Weighted(tuple((weight * w, part) for w, part in self.parts))

    __rmul__ = __mul__


class Weighted(Objective):
    """A weighted sum; what `+` and `*` answer."""

    def __init__(self, parts: tuple[tuple[float, Objective], ...]) -> None:
        self._parts = parts

    @property
    def parts(self) -> tuple[tuple[float, Objective], ...]:
        """(weight, objective) of every term."""
        return self._parts

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Every term times its weight."""
        return torch.stack([w * part(answer, y, trace) for w, part in self.parts]).sum()

    def __repr__(self) -> str:
        return " + ".join(f"{w:g} * {part!r}" for w, part in self.parts)


def check_exit_weights(weights: Sequence[float]) -> None:
    """Check that the weights of exits are finite numbers of at least 0, one of them above it.

    Raises:
        ConfigError: they are not; an exit with a negative weight would be trained to answer wrongly.
    """
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ConfigError(
            f"exit weights must be finite, at least 0 and not all 0, got {tuple(weights)}; give 0 to an exit that is "
            f"not to be trained"
        )
