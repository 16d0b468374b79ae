"""Rules turn scores into keep. In eval mode every rule is hard and looks at one row at a time.

Scores are logits: a unit is kept where its score is above 0 (or above `at`). Rules differ in what they do in training:
nothing, a probability, a sample, a straight-through gradient.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynanet.core.errors import ConfigError, check_sizes
from dynanet.core.gate import Rule as Rule


class BinaryRule(Rule):
    """Decides on every unit by itself: in eval mode a unit is kept where its score is above `at`.

    Attributes:
        at: the threshold of eval mode.
    """

    at: float = 0.0

    @property
    def decides(self) -> str:
        """The threshold, in words."""
        return f"scores above {self.at:g}"

    def forward(self, score: Tensor) -> Tensor:
        """Keep (rows..., units): `train_keep` in training, 1 where score > at in eval mode."""
        return self.train_keep(score) if self.training else self._above(score)

    @abstractmethod
    def train_keep(self, score: Tensor) -> Tensor:
        """Keep in training, of the shape of score."""

    def _above(self, score: Tensor) -> Tensor:
        return (score > self.at).to(score.dtype)


class Threshold(BinaryRule):
    """Keep where the score is above `at`, in training too. No gradient reaches the scorer."""

    def __init__(self, at: float = 0.0) -> None:
        super().__init__()
        self.at = at

    def train_keep(self, score: Tensor) -> Tensor:
        """1 where score > at."""
        return self._above(score)


class StraightThrough(BinaryRule):
    """Hard in the forward pass; the gradient is that of a sigmoid (Bengio et al. 2013, arXiv:1308.3432).

    Args:
        at: the threshold.
        temperature: of the sigmoid; lower is steeper. A schedule may change it.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    differentiable = True

    def __init__(self, at: float = 0.0, temperature: float = 1.0) -> None:
        super().__init__()
        _positive(temperature)
        self.at, self.temperature = at, temperature

    def train_keep(self, score: Tensor) -> Tensor:
        """1 where score > at, with the gradient of sigmoid((score - at) / temperature)."""
        return _straight_through(self._above(score), ((score - self.at) / self.temperature).sigmoid())


class Gumbel(BinaryRule):
    """A binary Gumbel-softmax sample in training: hard in the forward pass, relaxed in the backward pass.

    Maddison et al. 2017 (arXiv:1611.00712), Jang et al. 2017 (arXiv:1611.01144); as ConvNet-AIG gates its layers.

    Args:
        temperature: of the relaxation. A schedule may change it.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    differentiable = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        _positive(temperature)
        self.temperature = temperature

    def train_keep(self, score: Tensor) -> Tensor:
        """A sample: 1 with probability sigmoid(score)."""
        # The difference of two Gumbel variables is logistic noise.
        uniform = torch.rand_like(score).clamp(1e-6, 1 - 1e-6)
        soft = ((score + uniform.logit()) / self.temperature).sigmoid()
        return _straight_through((soft > 0.5).to(score.dtype), soft)


class Bernoulli(BinaryRule):
    """A sample in training, without gradient: for REINFORCE, with `log_prob`."""

    def train_keep(self, score: Tensor) -> Tensor:
        """A sample: 1 with probability sigmoid(score)."""
        return torch.bernoulli(score.detach().sigmoid())

    @staticmethod
    def log_prob(score: Tensor, keep: Tensor) -> Tensor:
        """Log-probability of a sampled keep, elementwise, for REINFORCE to multiply with the reward."""
        return keep * nn.functional.logsigmoid(score) + (1 - keep) * nn.functional.logsigmoid(-score)


class Sigmoid(BinaryRule):
    """A probability in training: every unit runs, and its answer is blended in.

    Args:
        temperature: of the sigmoid. A schedule may change it.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    differentiable = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        _positive(temperature)
        self.temperature = temperature

    def train_keep(self, score: Tensor) -> Tensor:
        """sigmoid(score / temperature)."""
        return (score / self.temperature).sigmoid()


class TopK(Rule):
    """Keep the k units with the highest scores of every row (experts, channels). No gradient.

    Args:
        k: how many units a row keeps.

    Raises:
        ConfigError: k below 1.
    """

    competes = True

    def __init__(self, k: int) -> None:
        super().__init__()
        check_sizes(k=k)
        self.k = k

    @property
    def decides(self) -> str:
        """The number of units, in words."""
        return f"the {self.k} best scores"

    def check(self, units: int) -> None:
        """Check that k is at most the number of units."""
        if self.k > units:
            raise ConfigError(f"top-k got k = {self.k} but there are only {units} units; lower k")

    def forward(self, score: Tensor) -> Tensor:
        """1 at the k highest scores of every row."""
        self.check(score.shape[-1])
        return _best(score, self.k)


class OneOf(Rule):
    """Keep one unit of every row: drawn from the softmax in training, the most probable one in eval mode.

    The draw carries no gradient: for REINFORCE, with `log_prob`.
    """

    competes = True

    @property
    def decides(self) -> str:
        """The most probable unit, in words."""
        return "the best score"

    def forward(self, score: Tensor) -> Tensor:
        """1 at one unit of every row. A draw is the highest score after Gumbel noise."""
        score = score.detach()
        if self.training:
            score = score + _gumbel_like(score)
        return torch.zeros_like(score).scatter(-1, score.argmax(-1, keepdim=True), 1.0)

    @staticmethod
    def log_prob(score: Tensor, keep: Tensor) -> Tensor:
        """Log-probability of the draw, (rows...)."""
        return (score.log_softmax(-1) * keep).sum(-1)


class RelaxedTopK(Rule):
    """Keep the k units with the highest scores of every row (paths, widths), relaxed in training.

    In training keep is a relaxed k-hot vector that sums to k: for k = 1 softmax(score / temperature), for more
    sigmoid((score - t) / temperature) with a threshold t per row that makes the sum k (top-k as entropic optimal
    transport: Xie et al. 2020, arXiv:2002.06504). As the temperature falls (`train.anneal_temperature`) it approaches
    the hard choice of eval mode. With `noise`, Gumbel noise makes it a sample (Gumbel-softmax: Jang et al. 2017,
    arXiv:1611.01144); with `hard`, the forward pass is hard and the gradient that of the relaxed vector
    (straight-through).

    With `costs`, a unit's score is lowered by `price` times its cost, in training and in eval mode: one trained network
    then serves many budgets, by setting the price (`path_select.price_for`).

    Args:
        k: units per row.
        temperature: of the softmax in training.
        noise: Gumbel noise on the scores in training.
        hard: straight-through in training.
        costs: (units,), of one row; relative ones keep the price at the scale of scores.

    Attributes:
        price: scores per unit of cost; a buffer, saved with the model. 0 in a new rule.

    Raises:
        ConfigError: k below 1, a temperature that is not above 0, costs that are negative or not finite.
    """

    differentiable = True
    competes = True
    costs: Tensor | None
    price: Tensor

    def __init__(
        self,
        k: int = 1,
        temperature: float = 1.0,
        *,
        noise: bool = False,
        hard: bool = False,
        costs: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        check_sizes(k=k)
        _positive(temperature)
        self.k, self.temperature = k, temperature
        self.noise, self.hard = noise, hard
        self.register_buffer("costs", None if costs is None else _costs(costs))
        self.register_buffer("price", torch.zeros(()))

    @property
    def decides(self) -> str:
        """The number of units, in words."""
        return f"the {self.k} best scores"

    def check(self, units: int) -> None:
        """Check that k is at most the number of units, and that there is a cost for each."""
        if self.k > units:
            raise ConfigError(f"relaxed top-k got k = {self.k} but there are only {units} units; lower k")
        if self.costs is not None and self.costs.shape[0] != units:
            raise ConfigError(f"relaxed top-k got {self.costs.shape[0]} costs for {units} units; give one each")

    def forward(self, score: Tensor) -> Tensor:
        """Keep (rows..., units) that sums to k for every row."""
        if self.costs is not None:
            score = score - (self.price * self.costs).to(score.dtype)
        if not self.training:
            return _best(score, self.k)
        if self.noise:
            score = score + _gumbel_like(score)
        relaxed = self._relaxed(score)
        return _straight_through(_best(score, self.k), relaxed) if self.hard else relaxed

    def _relaxed(self, score: Tensor) -> Tensor:
        _positive(self.temperature)  # a schedule may have changed it
        score = score / self.temperature
        if self.k == 1:
            return score.softmax(-1)
        if self.k == score.shape[-1]:
            return torch.ones_like(score)
        threshold = self._threshold(score.detach())
        # The bisection has no gradient. By the implicit function theorem the threshold moves with each score by its
        # share of the slope of the sum, so that the sum stays k. In the forward pass this adds 0.
        chance = (score.detach() - threshold).sigmoid()
        slope = (chance * (1 - chance)).clamp(min=torch.finfo(score.dtype).tiny)
        moves = (slope / slope.sum(-1, keepdim=True) * (score - score.detach())).sum(-1, keepdim=True)
        return (score - threshold - moves).sigmoid()

    def _threshold(self, score: Tensor) -> Tensor:
        """The threshold (rows..., 1) at which sigmoid(score - threshold) sums to k, by bisection."""
        beyond = math.log(score.shape[-1])
        low, high = score.amin(-1, keepdim=True) - beyond, score.amax(-1, keepdim=True) + beyond
        for _ in range(60):
            middle = (low + high) / 2
            too_many = (score - middle).sigmoid().sum(-1, keepdim=True) > self.k
            low = torch.where(too_many, middle, low)
            high = torch.where(too_many, high, middle)
        return (low + high) / 2


def _best(score: Tensor, k: int) -> Tensor:
    """1 at the k highest scores of every row."""
    return torch.zeros_like(score).scatter(-1, score.topk(k, dim=-1).indices, 1.0)


def _straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft`."""
    return hard + (soft - soft.detach())


def _gumbel_like(score: Tensor) -> Tensor:
    """Gumbel noise of the shape of score."""
    return -torch.empty_like(score).exponential_().clamp(min=1e-20).log()


def _costs(costs: Sequence[float] | Tensor) -> Tensor:
    tensor = torch.as_tensor(costs).detach().to(torch.get_default_dtype(), copy=True)
    if tensor.dim() != 1 or not (tensor.is_meta or (tensor.isfinite().all() and (tensor >= 0).all())):
        raise ConfigError(f"relaxed top-k got costs {tensor.tolist()}; give one finite cost per unit, 0 or more")
    return tensor


def _positive(temperature: float) -> None:
    if not temperature > 0:
        raise ConfigError(f"temperature must be above 0, got {temperature}")
