"""How sure a decoder is of its next token after some of its layers (CALM: Schuster et al. 2022, arXiv:2207.07061).

Higher is surer. Each of the paper's three measures, on a scale that does not saturate: the same order, no ties in
float32; `level` turns the paper's thresholds in [0, 1] into it.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional


class TokenConfidence(nn.Module, ABC):
    """Scores tokens."""

    @abstractmethod
    def forward(self, logits: Tensor, x: Tensor, before: Tensor) -> Tensor:
        """(R,) from logits (R, V), the features they were read from (R, D), and those one layer earlier (R, D)."""

    @abstractmethod
    def level(self, share: float) -> float:
        """The score that corresponds to the paper's threshold between 0 and 1."""


class SoftmaxGap(TokenConfidence):
    """The best probability minus the second best, as -log(1 - gap)."""

    def forward(self, logits: Tensor, x: Tensor, before: Tensor) -> Tensor:
        """1 - gap is twice the second best probability plus all the others', summed in logarithms."""
        best = logits.topk(2, dim=-1)
        others = logits.scatter(-1, best.indices[..., :1], -torch.inf).logsumexp(-1)
        return logits.logsumexp(-1) - torch.logaddexp(others, best.values[..., 1])

    def level(self, share: float) -> float:
        """-log(1 - share)."""
        return -math.log1p(-share) if share < 1 else math.inf


class Saturation(TokenConfidence):
    """How little the last layer changed the features: their cosine, as -log((1 - cosine) / 2)."""

    def forward(self, logits: Tensor, x: Tensor, before: Tensor) -> Tensor:
        """1 - cosine is half the squared distance of the directions, which does not cancel."""
        apart = functional.normalize(x, dim=-1) - functional.normalize(before, dim=-1)
        return -(apart.square().sum(-1) / 4).clamp(min=torch.finfo(x.dtype).tiny).log()

    def level(self, share: float) -> float:
        """Of a cosine."""
        return -math.log((1 - share) / 2) if share < 1 else math.inf


class LearnedToken(TokenConfidence):
    """The log-odds that the token is the whole model's: one linear map of the features, the same at every exit.

    Args:
        width: features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def forward(self, logits: Tensor, x: Tensor, before: Tensor) -> Tensor:
        """w x + b; features are detached, as the paper trains it afterwards."""
        return self.linear(x.detach())[..., 0]

    def level(self, share: float) -> float:
        """Log-odds of a probability."""
        return math.log(share / (1 - share)) if 0 < share < 1 else math.copysign(math.inf, share - 0.5)


def consistency_loss(confidence: TokenConfidence, answers: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Binary cross-entropy of a learned confidence against "this exit says what the last one says" (CALM, section 3.5).

    Args:
        confidence: scores are log-odds.
        answers: of every exit, in order, (logits, features, features one layer earlier) of tokens (R, ...).
    """
    last = answers[-1][0].argmax(-1)
    scores = torch.stack([confidence(*answer) for answer in answers[:-1]])
    agrees = torch.stack([logits.argmax(-1) == last for logits, _, _ in answers[:-1]])
    return functional.binary_cross_entropy_with_logits(scores, agrees.to(scores.dtype))
