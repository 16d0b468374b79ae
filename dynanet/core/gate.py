"""A Gate makes a Decision: a scorer says how much a unit matters for a row, a rule turns scores into keep."""

from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.errors import StructureError


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

    def __init__(self, scorer: nn.Module, rule: nn.Module, units: int = 1) -> None:
        super().__init__()
        if callable(check := getattr(rule, "check", None)):
            check(units)
        self.scorer = scorer
        self.rule = rule
        self.units = units

    @property
    def decides(self) -> str:
        """In words, by what rule in eval mode; see `Dynamic.decides`."""
        said = getattr(self.rule, "decides", None)
        return said if isinstance(said, str) else type(self.rule).__name__

    def forward(self, x: Any, present: Tensor | None = None) -> Decision:
        """Decide for every row of x.

        Args:
            x: what the scorer takes.
            present: (rows...), 1 where there is a row, 0 for padding: of that nothing is kept, and the rule never sees
                it. For rules that count rows; to others padding is all the same.

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
