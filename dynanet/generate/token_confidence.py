"""Confidence of a decoder in its next token after some of its layers (CALM: Schuster et al. 2022, arXiv:2207.07061).

Higher is surer. The paper's three measures are put on scales that do not saturate, so that the order stays and float32
has no ties; `level` converts the paper's thresholds in [0, 1].
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional


class TokenConfidence(nn.Module, ABC):
    """Scores tokens after a layer; higher is surer."""

    @abstractmethod
    def forward(self, logits: Tensor, x: Tensor, before: Tensor) -> Tensor:
        """Scores (R,) from logits (R, V), the features they are read from (R, D), and those one layer before (R, D)."""

    @abstractmethod
    def level(self, share: float) -> float:
        """The score that corresponds to the paper's threshold between 0 and 1."""


class SoftmaxGap(TokenConfidence):
    """The best probability minus the second best, as -log(1 - gap)."""

    def forward(self, logits: Tensor, x: Tensor, before: Tensor) -> Tensor:
        """Scores (R,) = -log(1 - gap)."""
        # 1 - gap is twice the second best probability plus all others, summed in logarithms so that nothing cancels.
        best = logits.topk(2, dim=-1)
        others = logits.scatter(-1, best.indices[..., :1], -torch.inf).logsumexp(-1)
        return logits.logsumexp(-1) - torch.logaddexp(others, best.values[..., 1])

    def level(self, share: float) -> float:
        """The score -log(1 - share) of a gap."""
        return -math.log1p(-share) if share < 1 else math.inf


class Saturation(TokenConfidence):
    """How little the last layer changed the features: their cosine, as -log((1 - cosine) / 2)."""

    def forward(self, logits: Tensor, x: Tensor, before: Tensor) -> Tensor:
        """Scores (R,) = -log((1 - cosine) / 2)."""
        # 1 - cosine is half the squared distance of the directions: unlike the difference, that does not cancel.
        apart = functional.normalize(x, dim=-1) - functional.normalize(before, dim=-1)
        return -(apart.square().sum(-1) / 4).clamp(min=torch.finfo(x.dtype).tiny).log()

    def level(self, share: float) -> float:
        """The score of a cosine."""
        return -math.log((1 - share) / 2) if share < 1 else math.inf


class LearnedToken(TokenConfidence):
    """The log-odds that the token equals that of the whole model: a linear map of the features, shared by all exits.

    Args:
        width: number of features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, logits: Tensor, x: Tensor, before: Tensor) -> Tensor:
        """Scores (R,) = w x + b. Features are detached, as the paper trains this after the decoder."""
        return self.linear(x.detach())[..., 0]

    def level(self, share: float) -> float:
        """The score of a probability: its log-odds."""
        return math.log(share / (1 - share)) if 0 < share < 1 else math.copysign(math.inf, share - 0.5)


def consistency_loss(confidence: TokenConfidence, answers: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Binary cross-entropy of a learned confidence against agreement with the last exit (CALM, section 3.5).

    Args:
        confidence: one whose scores are log-odds.
        answers: of every exit, in order, (logits, features, features one layer earlier) of tokens (R, ...).
    """
    last = answers[-1][0].argmax(-1)
    scores = torch.stack([confidence(*answer) for answer in answers[:-1]])
    agrees = torch.stack([logits.argmax(-1) == last for logits, _, _ in answers[:-1]])
    return functional.binary_cross_entropy_with_logits(scores, agrees.to(scores.dtype))
