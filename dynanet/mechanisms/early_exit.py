"""Early exit: classifiers along a staged backbone; a row leaves at the first one that is sure enough."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.errors import StructureError
from dynanet.core.halt import Halt
from dynanet.gates.confidence import Confidence, MaxProbability


class EarlyExit(Halt):
    """Intermediate classifiers on any staged backbone (BranchyNet, arXiv:1709.01686; MSDNet, arXiv:1703.09844).

    In training every exit answers, for multi-exit objectives; the answer is the last one's. In eval mode a row goes on
    past step k while its confidence is below `thresholds[k]`. A new model never exits early (thresholds are infinite);
    `infer.calibrate` finds thresholds for a budget.

    Args:
        stages: stage k maps the state of stage k - 1 to its own; the first takes the input. A state is any pytree of
            tensors whose first axis is the batch.
        exits: exit k maps stage k's state to logits (B, classes).
        confidence: how sure logits are.

    Attributes:
        thresholds: (steps - 1,), in the units of `confidence`. +inf: nobody leaves here; -inf: everybody.

    Raises:
        StructureError: no stages, or not one exit per stage.
    """

    def __init__(self, stages: Sequence[nn.Module], exits: Sequence[nn.Module], confidence: Confidence | None = None):
        super().__init__()
        if len(stages) != len(exits) or not stages:
            raise StructureError(f"early exit needs one exit per stage; got {len(stages)} stages, {len(exits)} exits")
        self.stages, self.exits = nn.ModuleList(stages), nn.ModuleList(exits)
        self.confidence = confidence if confidence is not None else MaxProbability()
        self.steps = len(self.stages)
        self.thresholds: Tensor
        self.register_buffer("thresholds", torch.full((self.steps - 1,), torch.inf))

    def start(self, x: Any) -> Any:
        """The input, and no memory of earlier exits."""
        return x, None

    def step(self, k: int, state: Any) -> tuple[Any, Tensor]:
        """Stage k and its exit."""
        features, memory = state
        features = self.stages[k](features)
        logits = self.exits[k](features)
        return (features, self.confidence.remember(logits, memory)), logits

    def score(self, k: int, state: Any, answer: Tensor) -> Tensor:
        """The confidence of exit k."""
        return self.confidence(answer, state[1])

    def goes_on(self, k: int, score: Tensor) -> Tensor:
        """Past step k while confidence is below the threshold; always in training."""
        if self.training:
            return torch.ones_like(score)
        # Compared in float32: a half-precision score would round the threshold and let out who is tied with it.
        return (score.float() < self.thresholds[k].float()).to(score.dtype)
