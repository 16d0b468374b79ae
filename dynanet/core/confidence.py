"""A Confidence says how sure an answer is; `dynanet.gates` holds the criteria of the field."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Confidence(nn.Module, ABC):
    """Scores answers (rows, classes) with (rows, 1); higher is surer. A `memory` follows a row from exit to exit."""

    @property
    def decides(self) -> str:
        """The name of the criterion; see `Dynamic.decides`."""
        return type(self).__name__

    def at(self, k: int) -> "Confidence":
        """The confidence of exit k, counted from 0. Most criteria are the same at every exit."""
        return self

    def remember(self, logits: Tensor, memory: Any) -> Any:
        """What the next exit must know about this one; None at the first. Most criteria need nothing."""
        return memory

    @abstractmethod
    def forward(self, logits: Tensor, memory: Any = None) -> Tensor:
        """Scores (rows, 1) for logits (rows, classes); `memory` is what `remember` returned for this exit."""
