"""Pondering: a row runs step after step until it halts. ACT averages its states, PonderNet learns when to stop."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.halt import Halt
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.ops.halting import halting_scores, ponder_cost


class ACT(Halt):
    """Adaptive computation time per row (Graves 2016, arXiv:1603.08983, eq. 5-9), over residual blocks or one cell.

    After step n a row has the halting score h_n = sigmoid(halting_n(x_n)). It stops at the first step N at which the
    scores sum to 1 - eps or more, or at the last step. Its answer is the mean of its states, weighted with the scores,
    the last with the remainder R = 1 - (h_1 + ... + h_{N-1}). Rows that stopped are not computed.

    `PonderCost` is the term of the loss that makes rows stop.

    Args:
        cells: cell n maps the state of step n - 1 to that of step n, of the same shape: the blocks of a stage, or the
            same module repeated for a recurrent cell.
        halting: maps the state after each step but the last to a halting logit (rows, 1), for example `PooledScorer`
            with a bias of -3.
        eps: distance from 1 at which the sum of scores stops.

    Raises:
        StructureError: no cells, or not one halting module for every step but the last.
        ConfigError: eps outside (0, 1).
    """

    def __init__(self, cells: Sequence[nn.Module], halting: Sequence[nn.Module], eps: float = 0.01) -> None:
        super().__init__()
        _check_steps("ACT", cells, halting)
        if not 0 < eps < 1:
            raise ConfigError(f"eps must be between 0 and 1, got {eps}; the paper has 0.01")
        self.cells, self.halting = nn.ModuleList(cells), nn.ModuleList(halting)
        self.steps, self.eps = len(cells), eps

    def start(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input, the sum of scores (rows, 1), and the weighted sum of states."""
        return x, x.new_zeros(x.shape[0], 1), torch.zeros_like(x)

    def step(self, k: int, state: tuple[Tensor, Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Run cell k; the answer is that of a row that stops here."""
        x, total, mean = state
        x = self.cells[k](x)
        answer = mean + _spread(1 - total, x) * x
        if k + 1 < self.steps:
            h = _scores(self.halting[k](x), x).sigmoid()
            total = total + h
            mean = mean + _spread(h, x) * x
        return (x, total, mean), answer

    def score(self, k: int, state: tuple[Tensor, Tensor, Tensor], answer: Tensor) -> Tensor:
        """The sum of the halting scores, (rows, 1)."""
        return state[1]

    def should_continue(self, k: int, score: Tensor) -> Tensor:
        """1 while the sum is below 1 - eps, in training too: the paper's gradient is that of means and remainders."""
        return (score < 1 - self.eps).to(score.dtype)


@dataclass(frozen=True)
class PonderCost(Objective):
    """N + R, the steps and the remainder, averaged over the batch and summed over the ACT layers of a model.

    Its gradient is -1 for every halting score before the last (Graves 2016, eq. 10-12); N itself has none. Weighted
    with the paper's tau it is a term of the loss: `CrossEntropy() + 0.01 * PonderCost()`.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The cost of the halting scores in the trace.

        Raises:
            StructureError: no ACT layer, or rows that were not computed: use train mode or the dense form.
        """
        passes = [trace.full_pass(name)[0] for name in trace.all(ACT)]
        costs = [ponder_cost([call.keep for call in calls], halting_scores(calls)) for calls in passes]
        return torch.stack(costs).sum()


class PonderNet(Halt):
    """Stops after step n with a learned probability (Banino et al. 2021, arXiv:2107.05407).

    lambda_n = sigmoid(halting_n(state_n)) is the probability to stop at n given that n is reached, so that
    p_n = lambda_n (1 - lambda_1) ... (1 - lambda_{n-1}); the last step takes the remainder. In training all steps run,
    keep is the probability to go on, the answer is the mean over p, and costs are expected costs. In eval mode a row
    stops once the probability of having stopped reaches `at`: at the median for 1/2. Rows that stopped are not
    computed.

    Args:
        cells: cell n maps the state of step n - 1 to that of step n; a state is any pytree of tensors (rows, ...).
        exits: one per step, maps its state to an answer (rows, ...).
        halting: maps the state after each step but the last to a halting logit (rows, 1).
        at: quantile at which rows stop in eval mode. May be changed at any time.

    Raises:
        StructureError: no cells, not one exit per step, or not one halting module for every step but the last.
        ConfigError: `at` outside (0, 1).
    """

    def __init__(
        self, cells: Sequence[nn.Module], exits: Sequence[nn.Module], halting: Sequence[nn.Module], at: float = 0.5
    ) -> None:
        super().__init__()
        _check_steps("PonderNet", cells, halting)
        if len(exits) != len(cells):
            raise StructureError(f"PonderNet needs one exit per step; got {len(cells)} cells and {len(exits)} exits")
        if not 0 < at < 1:
            raise ConfigError(f"at must be a probability between 0 and 1, got at = {at}")
        self.cells, self.halting = nn.ModuleList(cells), nn.ModuleList(halting)
        self.exits = nn.ModuleList(exits)
        self.steps, self.at = len(cells), at

    def start(self, x: Any) -> tuple[Any, Any]:
        """The input, and no hazard."""
        return x, None

    def step(self, k: int, state: tuple[Any, Any]) -> tuple[tuple[Any, Any], Tensor]:
        """Run cell k; the state holds the hazard -log(1 - lambda), summed over the steps in eval mode."""
        x, hazard = state
        x = self.cells[k](x)
        if k + 1 < self.steps:
            more = functional.softplus(_scores(self.halting[k](x), x))
            hazard = more if self.training or hazard is None else hazard + more
        return (x, hazard), self.exits[k](x)

    def score(self, k: int, state: tuple[Any, Any], answer: Tensor) -> Tensor:
        """The hazard (rows, 1): of this step in training, of all steps so far in eval mode."""
        return state[1]

    def should_continue(self, k: int, score: Tensor) -> Tensor:
        """The probability to go on in training; in eval mode 1 while that of not having stopped is above 1 - `at`."""
        if self.training:
            return (-score).exp()
        return (score < -math.log1p(-self.at)).to(score.dtype)


@dataclass(frozen=True)
class PonderLoss(Objective):
    """The loss of PonderNet: the expected cross-entropy, and a pull towards stopping geometrically (eq. 5).

    sum over n of p_n CE(y, answer_n) + beta * KL(p || geometric), averaged over the batch, where the geometric
    distribution has probability `prior` and is cut off after the last step.

    Args:
        prior: lambda_p: 1 / prior is about the number of steps that a row should take.
        beta: weight of the divergence.
        halt: name of the PonderNet; None where the model has only one.

    Raises:
        ConfigError: a prior outside (0, 1) or a negative beta.
    """

    prior: float
    beta: float = 0.01
    _: KW_ONLY
    halt: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1 or self.beta < 0:
            raise ConfigError(
                f"prior is {self.prior} and beta {self.beta}; give a probability between 0 and 1, and a weight of at "
                f"least 0"
            )

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """The loss of the logits (B, C) and hazards in the trace, with labels y (B,).

        Raises:
            StructureError: no PonderNet, several and none named, or rows that were not computed.
        """
        layer, name = trace.one(PonderNet, self.halt)
        exits = trace.full_pass(name, y.shape[0])[1]
        log_p = log_stopping(trace, layer, name)
        p = log_p.exp()
        losses = [functional.cross_entropy(logits, y, reduction="none") for logits in exits]
        steps = torch.arange(len(losses), device=p.device, dtype=p.dtype)
        log_prior = (steps * math.log1p(-self.prior)).log_softmax(0)
        divergence = (p * (log_p - log_prior)).sum(1)
        return ((p * torch.stack(losses, 1)).sum(1) + self.beta * divergence).mean()


def log_stopping(trace: Trace, layer: PonderNet, name: str) -> Tensor:
    """The logarithm of p, (B, steps): the probability that a row stops after its first, second, ... step.

    Args:
        trace: of a pass.
        layer: the PonderNet.
        name: its name in the trace.

    Raises:
        StructureError: rows that were not computed: use train mode or the dense form.
    """
    calls, answers = trace.full_pass(name)
    scores = [call.decision.score for call in calls]
    if not scores:  # one step only
        return answers[0].new_zeros(answers[0].shape[0], 1)
    hazards = torch.cat(scores, 1)
    if not layer.training:
        hazards = hazards.diff(dim=1, prepend=torch.zeros_like(hazards[:, :1]))
    not_before = -(hazards.cumsum(1) - hazards)
    tiny = torch.finfo(hazards.dtype).tiny
    stops = (-torch.expm1(-hazards)).clamp(min=tiny).log()  # log lambda, from -log(1 - lambda)
    return torch.cat([not_before + stops, -hazards.sum(1, keepdim=True)], 1)


def _check_steps(what: str, cells: Sequence[nn.Module], halting: Sequence[nn.Module]) -> None:
    if not cells or len(halting) != len(cells) - 1:
        raise StructureError(
            f"{what} needs at least one cell, and a halting module for each but the last; got {len(cells)} cells and "
            f"{len(halting)} halting modules"
        )


def _spread(weight: Tensor, x: Tensor) -> Tensor:
    """Reshape a weight (rows, 1) so that it multiplies x (rows, ...)."""
    return weight.reshape(weight.shape[0], *[1] * (x.dim() - 1))


def _scores(score: Tensor, state: Any) -> Tensor:
    """Check that there is one score per row of the state."""
    rows = tree_leaves(state)[0].shape[0]
    if score.shape != (rows, 1):
        raise StructureError(
            f"a halting module returned scores of shape {tuple(score.shape)} for {rows} rows; expected ({rows}, 1)"
        )
    return score
