"""Rules turn scores into keep. In eval mode every rule is hard and looks at one row at a time.

Scores are logits: a unit is kept where its score is above 0 (or above `at`). A rule differs from another in what it
does in training: nothing, a probability, a sample, a gradient that passes the step.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dynanet.core.errors import ConfigError


class Rule(nn.Module, ABC):
    """From scores (rows..., units) to keep of the same shape and dtype."""

    @abstractmethod
    def forward(self, score: Tensor) -> Tensor:
        """Keep for every row and unit."""


class Threshold(Rule):
    """Keep where the score is above `at`. No gradient reaches the scorer."""

    def __init__(self, at: float = 0.0):
        super().__init__()
        self.at = at

    def forward(self, score: Tensor) -> Tensor:
        """1 where score > at."""
        return (score > self.at).to(score.dtype)


class TopK(Rule):
    """Keep the k units with the highest scores of every row (experts, channels). No gradient.

    Args:
        k: how many units a row keeps.

    Raises:
        ConfigError: k below 1, or, at the first call, more than there are units.
    """

    def __init__(self, k: int):
        super().__init__()
        if k < 1:
            raise ConfigError(f"top-k got k = {k}; at least one unit must be kept, so k >= 1")
        self.k = k

    def forward(self, score: Tensor) -> Tensor:
        """1 at the k highest scores of every row."""
        if self.k > score.shape[-1]:
            raise ConfigError(f"top-k got k = {self.k} but there are only {score.shape[-1]} units; lower k")
        best = score.topk(self.k, dim=-1).indices
        return torch.zeros_like(score).scatter(-1, best, 1.0)


class StraightThrough(Rule):
    """Hard in the forward pass; the gradient is that of a sigmoid (Bengio et al. 2013, arXiv:1308.3432).

    Args:
        at: the threshold.
        temperature: of the sigmoid; lower is steeper. A schedule may change it.
    """

    def __init__(self, at: float = 0.0, temperature: float = 1.0):
        super().__init__()
        self.at, self.temperature = at, temperature

    def forward(self, score: Tensor) -> Tensor:
        """1 where score > at, with the sigmoid's gradient in training."""
        hard = (score > self.at).to(score.dtype)
        if not self.training:
            return hard
        soft = ((score - self.at) / self.temperature).sigmoid()
        return hard + (soft - soft.detach())


class Gumbel(Rule):
    """A binary Gumbel-softmax sample in training, hard forward and soft backward; hard at 0 in eval.

    Maddison et al. 2017 (arXiv:1611.00712), Jang et al. 2017 (arXiv:1611.01144); as ConvNet-AIG gates its layers.

    Args:
        temperature: of the relaxation. A schedule may change it.
    """

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, score: Tensor) -> Tensor:
        """A sample in training (logistic noise is the difference of two Gumbel draws), score > 0 in eval."""
        if not self.training:
            return (score > 0).to(score.dtype)
        uniform = torch.rand_like(score).clamp(1e-6, 1 - 1e-6)
        soft = ((score + uniform.logit()) / self.temperature).sigmoid()
        hard = (soft > 0.5).to(score.dtype)
        return hard + (soft - soft.detach())


class Bernoulli(Rule):
    """A sample in training, without gradient: for REINFORCE, with `log_prob`. Hard at 0 in eval."""

    def forward(self, score: Tensor) -> Tensor:
        """1 with probability sigmoid(score) in training, where score > 0 in eval."""
        if not self.training:
            return (score > 0).to(score.dtype)
        return torch.bernoulli(score.detach().sigmoid())

    @staticmethod
    def log_prob(score: Tensor, keep: Tensor) -> Tensor:
        """Log-probability of the sampled keep, elementwise: what REINFORCE multiplies with the reward."""
        return keep * nn.functional.logsigmoid(score) + (1 - keep) * nn.functional.logsigmoid(-score)


class Soft(Rule):
    """A probability in training (every unit runs, blended); hard at 0 in eval.

    Args:
        temperature: of the sigmoid. A schedule may change it.
    """

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, score: Tensor) -> Tensor:
        """sigmoid(score / temperature) in training, score > 0 in eval."""
        if self.training:
            return (score / self.temperature).sigmoid()
        return (score > 0).to(score.dtype)


class Always(Rule):
    """Keep everything: the full model, or a warm-up before gates are trained."""

    def forward(self, score: Tensor) -> Tensor:
        """All ones."""
        return torch.ones_like(score)


class Given(Rule):
    """Keep what is given, whatever the scores: a static pattern, or a random gate's rate fixed beforehand.

    Args:
        keep: (units,), the same for every row.
    """

    def __init__(self, keep: Tensor):
        super().__init__()
        self.keep: Tensor
        self.register_buffer("keep", keep)

    def forward(self, score: Tensor) -> Tensor:
        """The given keep for every row."""
        return self.keep.to(score).expand_as(score)
