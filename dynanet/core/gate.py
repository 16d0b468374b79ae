"""A Gate makes a Decision: a scorer says how much a unit matters for a row, a rule turns scores into keep."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.errors import StructureError


class Rule(nn.Module, ABC):
    """Turns scores (rows..., units) into keep of the same shape and dtype.

    In eval mode keep is 0 or 1. `dynanet.gates.rules` holds the rules of the field.

    Attributes:
        differentiable: in training, gradients flow from keep to the scores. `dynanet.testing` checks such gates for it.
        competes: units compete for places, so that a single unit is kept however low its score is.
        counts_rows: what is kept of a row depends on the other rows of a batch, so that padding must be left out.
    """

    differentiable: bool = False
    competes: bool = False
    counts_rows: bool = False

    @property
    def decides(self) -> str:
        """What is kept in eval mode, in words; see `Dynamic.decides`."""
        return type(self).__name__

    @abstractmethod
    def forward(self, score: Tensor) -> Tensor:
        """Keep for every row and unit."""

    def check(self, units: int) -> None:
        """Check that this rule fits a gate of `units` units.

        Raises:
            ConfigError: it does not, for example because it keeps more.
        """


class Gate(nn.Module):
    """Scores rows and decides.

    A gate decides row by row: nothing in it may be computed over the batch, or a row's answer would depend on its
    neighbours.

    Args:
        scorer: maps the layer's input to scores of shape (rows..., units).
        rule: maps scores to keep of the same shape; see `dynanet.gates.rules`.
        units: how many units the scores must speak of.

    Raises:
        ConfigError: a rule that does not fit this number of units.
    """

    def __init__(self, scorer: nn.Module, rule: Rule, units: int = 1) -> None:
        super().__init__()
        rule.check(units)
        self.scorer = scorer
        self.rule = rule
        self.units = units

    @property
    def decides(self) -> str:
        """What the rule keeps in eval mode, in words; see `Dynamic.decides`."""
        return self.rule.decides

    def forward(self, x: Any, present: Tensor | None = None) -> Decision:
        """Decide for every row of x.

        Args:
            x: what the scorer takes.
            present: (rows...), 1 where there is a row, 0 for padding, of which nothing is kept. Needed where the rule
                counts rows: it then does not see padding.

        Raises:
            StructureError: the scorer's answer is not (rows..., units). What a scorer answers is known when it runs;
                `CostModel(model, example)`, which training begins with, runs it.
        """
        score = self.scorer(x)
        if score.dim() < 2 or score.shape[-1] != self.units:
            raise StructureError(
                f"the scorer {type(self.scorer).__name__} answered scores of shape {tuple(score.shape)}; the last axis "
                f"must be {self.units}, one score per unit"
            )
        if present is None:
            return Decision(self.rule(score), score)
        there = (present > 0).nonzero(as_tuple=True)
        return Decision(torch.zeros_like(score).index_put(there, self.rule(score[there])), score)


def check_units(gate: nn.Module, units: int, what: str) -> None:
    """Check that a gate decides on the units of a layer; for modules that are not a `Gate` the first pass shows it.

    Raises:
        StructureError: another number of units.
    """
    if isinstance(gate, Gate) and gate.units != units:
        raise StructureError(f"the gate decides on {gate.units} units; expected {units}, the number of {what}")
