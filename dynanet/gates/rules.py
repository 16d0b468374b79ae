"""Rules turn scores into keep. In eval mode every rule is hard and looks at one row at a time.

Scores are logits: a unit is kept where its score is above 0 (or above `at`). A rule differs from another in what it
does in training: nothing, a probability, a sample, a gradient that passes the step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynanet.core.errors import ConfigError


class Rule(nn.Module, ABC):
    """From scores (rows..., units) to keep of the same shape and dtype.

    Attributes:
        differentiable: in training keep has a gradient to the scores, so that the gate learns from whatever hangs on
            it. `dynanet.testing` holds such gates to it.
        competes: units compete for places, so that an only one is kept however low its score is.
        counts_rows: what is kept of a row depends on the other rows of a batch, so that padding must not be among them.
        decides: what is kept in eval mode, in words.
    """

    differentiable: bool = False
    competes: bool = False
    counts_rows: bool = False

    @property
    def decides(self) -> str:
        """Its name, if nothing better is known."""
        return type(self).__name__

    @abstractmethod
    def forward(self, score: Tensor) -> Tensor:
        """Keep for every row and unit."""

    def check(self, units: int) -> None:
        """Does this rule fit so many units? A gate asks when it is made.

        Raises:
            ConfigError: it does not, say because it keeps more.
        """


class Threshold(Rule):
    """Keep where the score is above `at`. No gradient reaches the scorer."""

    def __init__(self, at: float = 0.0) -> None:
        super().__init__()
        self.at = at

    @property
    def decides(self) -> str:
        """Scores above `at`."""
        return f"scores above {self.at:g}"

    def forward(self, score: Tensor) -> Tensor:
        """1 where score > at."""
        return (score > self.at).to(score.dtype)


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
        if not isinstance(k, int) or k < 1:
            raise ConfigError(f"top-k got k = {k}; give how many units a row keeps, 1 or more")
        self.k = k

    @property
    def decides(self) -> str:
        """The k best."""
        return f"the {self.k} best scores"

    def check(self, units: int) -> None:
        """k is at most the number of units."""
        if self.k > units:
            raise ConfigError(f"top-k got k = {self.k} but there are only {units} units; lower k")

    def forward(self, score: Tensor) -> Tensor:
        """1 at the k highest scores of every row."""
        self.check(score.shape[-1])
        best = score.topk(self.k, dim=-1).indices
        return torch.zeros_like(score).scatter(-1, best, 1.0)


class StraightThrough(Rule):
    """Hard in the forward pass; the gradient is that of a sigmoid (Bengio et al. 2013, arXiv:1308.3432).

    Args:
        at: the threshold.
        temperature: of the sigmoid; lower is steeper. A schedule may change it.
    """

    differentiable = True

    def __init__(self, at: float = 0.0, temperature: float = 1.0) -> None:
        super().__init__()
        _positive(temperature)
        self.at, self.temperature = at, temperature

    @property
    def decides(self) -> str:
        """Scores above `at`."""
        return f"scores above {self.at:g}"

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

    differentiable = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        _positive(temperature)
        self.temperature = temperature

    @property
    def decides(self) -> str:
        """Scores above 0."""
        return "scores above 0"

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

    @property
    def decides(self) -> str:
        """Scores above 0."""
        return "scores above 0"

    def forward(self, score: Tensor) -> Tensor:
        """1 with probability sigmoid(score) in training, where score > 0 in eval."""
        if not self.training:
            return (score > 0).to(score.dtype)
        return torch.bernoulli(score.detach().sigmoid())

    @staticmethod
    def log_prob(score: Tensor, keep: Tensor) -> Tensor:
        """Log-probability of the sampled keep, elementwise: what REINFORCE multiplies with the reward."""
        return keep * nn.functional.logsigmoid(score) + (1 - keep) * nn.functional.logsigmoid(-score)


class Sigmoid(Rule):
    """A probability in training (every unit runs, blended); hard at 0 in eval.

    Args:
        temperature: of the sigmoid. A schedule may change it.
    """

    differentiable = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        _positive(temperature)
        self.temperature = temperature

    @property
    def decides(self) -> str:
        """Scores above 0."""
        return "scores above 0"

    def forward(self, score: Tensor) -> Tensor:
        """sigmoid(score / temperature) in training, score > 0 in eval."""
        if self.training:
            return (score / self.temperature).sigmoid()
        return (score > 0).to(score.dtype)


class RelaxedTopK(Rule):
    """Every row keeps its best k units, which exclude each other: paths, widths. Soft in training, so that it learns.

    In training the keep is a relaxed k-hot vector, between 0 and 1, that sums to k: for k = 1 softmax(score /
    temperature), for more sigmoid((score - t) / temperature) with the row's own threshold t that makes the sum k (top-k
    as entropic optimal transport: Xie et al. 2020, arXiv:2002.06504). As the temperature falls
    (`train.anneal_temperature`) it becomes the hard choice of eval mode. With `noise`, Gumbel noise makes it a sample
    (Gumbel-softmax: Jang et al. 2017, arXiv:1611.01144); with `hard`, the forward pass takes the hard choice and the
    gradient that of the relaxed one (straight-through).

    With `costs`, a unit's score is lowered by `price` times its cost, in training and in eval mode alike: one trained
    network then serves many budgets, by setting the price (`path_select.price_for`).

    Args:
        k: units per row.
        temperature: of the softmax in training.
        noise: Gumbel noise on the scores in training.
        hard: straight-through in training.
        costs: (units,), of one row; relative ones keep the price at the scale of scores.

    Attributes:
        price: what a unit of cost is worth, in scores; a buffer, saved with the model. 0 at the start.

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
        if not isinstance(k, int) or k < 1:
            raise ConfigError(f"picking got k = {k}; give how many units a row keeps, 1 or more")
        _positive(temperature)
        self.k, self.temperature, self.noise, self.hard = k, temperature, noise, hard
        self.register_buffer("costs", None if costs is None else _costs(costs))
        self.register_buffer("price", torch.zeros(()))

    @property
    def decides(self) -> str:
        """The k best."""
        return f"the {self.k} best scores"

    def check(self, units: int) -> None:
        """k is at most the number of units, and there is a cost for each."""
        if self.k > units:
            raise ConfigError(f"picking got k = {self.k} of only {units} units; lower k")
        if self.costs is not None and self.costs.shape[0] != units:
            raise ConfigError(f"picking got {self.costs.shape[0]} costs for {units} units; give one each")

    def forward(self, score: Tensor) -> Tensor:
        """Keep (rows..., units), which sums to k."""
        if self.costs is not None:
            score = score - (self.price * self.costs).to(score.dtype)
        if not self.training:
            return self._best(score)
        if self.noise:
            score = score - torch.empty_like(score).exponential_().clamp(min=1e-20).log()
        relaxed = self._relaxed(score)
        return self._best(score) + (relaxed - relaxed.detach()) if self.hard else relaxed

    def _best(self, score: Tensor) -> Tensor:
        return torch.zeros_like(score).scatter(-1, score.topk(self.k, dim=-1).indices, 1.0)

    def _relaxed(self, score: Tensor) -> Tensor:
        _positive(self.temperature)  # a schedule may have changed it
        score = score / self.temperature
        if self.k == 1:
            return score.softmax(-1)
        if self.k == score.shape[-1]:
            return torch.ones_like(score)
        threshold = self._threshold(score.detach())
        # How the threshold moves with the scores so that the sum stays k, for the gradient: each score's share of the
        # slope of the sum (the implicit function theorem). Forward it adds 0.
        chance = (score.detach() - threshold).sigmoid()
        slope = (chance * (1 - chance)).clamp(min=torch.finfo(score.dtype).tiny)
        moves = (slope / slope.sum(-1, keepdim=True) * (score - score.detach())).sum(-1, keepdim=True)
        return (score - threshold - moves).sigmoid()

    def _threshold(self, score: Tensor) -> Tensor:
        """(rows..., 1): where sigmoid(score - threshold) sums to k, by bisection."""
        beyond = math.log(score.shape[-1])
        low, high = score.amin(-1, keepdim=True) - beyond, score.amax(-1, keepdim=True) + beyond
        for _ in range(60):
            middle = (low + high) / 2
            too_many = (score - middle).sigmoid().sum(-1, keepdim=True) > self.k
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        return (low + high) / 2


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

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.keep: Tensor
        self.register_buffer("keep", keep)

    def forward(self, score: Tensor) -> Tensor:
        """The given keep for every row."""
        return self.keep.to(score).expand_as(score)


def _costs(costs: Sequence[float] | Tensor) -> Tensor:
    tensor = torch.as_tensor(costs).detach().to(torch.get_default_dtype(), copy=True)
    if tensor.dim() != 1 or not (tensor.is_meta or (tensor.isfinite().all() and (tensor >= 0).all())):
        raise ConfigError(f"picking got costs {tensor.tolist()}; give one finite cost per unit, 0 or more")
    return tensor


def _positive(temperature: float) -> None:
    if not temperature > 0:
        raise ConfigError(f"a rule got a temperature of {temperature}; give a number above 0")
