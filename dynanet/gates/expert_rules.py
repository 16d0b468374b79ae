"""Rules of mixtures of experts, which balance or limit the rows of an expert; they count the rows of a batch."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from dynanet.core.errors import ConfigError
from dynanet.core.gate import Rule
from dynanet.core.serving import CalledInParts


class BiasedTopK(Rule):
    """Top-k of sigmoid(score) + bias, with a bias per expert that training moves against its load.

    Balance without a loss (Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-V3): after each batch the bias of
    an expert with less than the mean load rises by `rate`, that of one with more falls. It affects the choice of
    experts, not their weights. In training it changes in the forward pass, as a batch norm's statistics do; in eval
    mode it is constant.

    Args:
        k: number of experts that a row keeps.
        experts: number of experts.
        rate: of the bias; 0.001 in the paper.

    Attributes:
        bias: (experts,), saved with the model.

    Raises:
        ConfigError: k below 1 or above the number of experts.
    """

    competes = True
    counts_rows = True

    def __init__(self, k: int, experts: int, rate: float = 1e-3) -> None:
        super().__init__()
        _check_k(k, experts)
        self.k = k
        self.rate = rate
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(experts))

    @property
    def decides(self) -> str:
        """The number of experts, in words."""
        return f"the {self.k} best of sigmoid(score) + bias"

    def check(self, units: int) -> None:
        """Check that there is a bias for each unit."""
        if units != self.bias.shape[0]:
            raise ConfigError(f"BiasedTopK was made for {self.bias.shape[0]} experts, and the gate has {units} units")

    def forward(self, score: Tensor) -> Tensor:
        """1 at the k experts of every row."""
        best = (score.sigmoid() + self.bias.to(score.dtype)).topk(self.k, dim=-1).indices
        keep = torch.zeros_like(score).scatter(-1, best, 1.0)
        if self.training and score.numel():
            with torch.no_grad():
                load = keep.flatten(0, -2).sum(0)
                self.bias += self.rate * (load.mean() - load).sign().to(self.bias.dtype)
        return keep


class BatchCoupledTopK(Rule, CalledInParts):  # an engine would see a batch in pieces, or padded
    """Top-k with a limit: an expert takes at most ceil(capacity * rows * k / experts) rows (Switch eq. 3).

    Batch-coupled: whether a row is served depends on the rows before it in the batch, so its answer changes with its
    neighbours, also in eval mode, and the laws of a dynamic layer do not hold. For comparison with networks trained
    this way, and for devices that need fixed shapes. First choices have precedence over second ones (GShard,
    arXiv:2006.16668), earlier rows over later ones. A row over the limit of an expert does not keep that expert.

    Args:
        k: number of experts that a row chooses.
        capacity: 1 is an equal share for every expert; Switch trains with 1 to 1.25.

    Raises:
        ConfigError: k below 1, or a capacity that is not positive.
    """

    competes = True
    counts_rows = True

    def __init__(self, k: int, capacity: float) -> None:
        super().__init__()
        if k < 1 or not capacity > 0:
            raise ConfigError(f"k must be at least 1 and capacity above 0, got k = {k} and capacity = {capacity}")
        self.k = k
        self.capacity = capacity

    @property
    def decides(self) -> str:
        """The number of experts and the capacity, in words."""
        return f"the {self.k} best scores, with a capacity of {self.capacity:g}"

    def check(self, units: int) -> None:
        """Check that k is at most the number of units."""
        _check_k(self.k, units)

    def forward(self, score: Tensor) -> Tensor:
        """1 at those of a row's k best experts whose limit was not reached."""
        experts = score.shape[-1]
        flat = score.flatten(0, -2)
        limit = math.ceil(self.capacity * flat.shape[0] * self.k / experts)
        chosen = functional.one_hot(flat.topk(self.k, dim=-1).indices, experts)  # (rows, k, experts)
        queue = chosen.transpose(0, 1).flatten(0, 1)  # all first choices, then all second ones
        served = queue * (queue.cumsum(0) <= limit)
        keep = served.unflatten(0, (self.k, flat.shape[0])).sum(0)
        return keep.to(score.dtype).reshape(score.shape)


def _check_k(k: int, experts: int) -> None:
    if not 1 <= k <= experts:
        raise ConfigError(f"k must be from 1 to {experts}, the number of experts; got k = {k} of {experts}")
