"""Pondering: a row runs step after step until it halts. ACT averages its states; PonderNet learns when to stop."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.halt import Halt
from dynanet.core.objective import Objective
from dynanet.core.trace import Call, Trace


class ACT(Halt):
    """Adaptive computation time per row (Graves 2016, arXiv:1603.08983, eq. 5-9), over residual blocks or one cell.

    After step n a row has the halting score h_n = sigmoid(halting_n(x_n)). It stops at the first step N at which the
    scores sum to 1 - eps or more, the last step if none does. Its answer is the mean of its states, weighted with the
    scores, the last with the remainder R = 1 - (h_1 + ... + h_{N-1}). Rows that stopped are not computed.

    `PonderCost` is the term of the loss that makes rows stop.

    Args:
        cells: step n maps x of step n - 1 to its own, of the same shape: the blocks of a stage; n times the same
            module for a recurrent cell.
        halting: after step n, x to a halting logit (rows, 1); one for every step but the last, say a `PooledScorer`
            with bias -3.
        eps: how far below 1 a sum may stop.

    Raises:
        StructureError: no cells, or not one halting module for every step but the last.
        ConfigError: eps outside (0, 1).
    """

    def __init__(self, cells: Sequence[nn.Module], halting: Sequence[nn.Module], eps: float = 0.01) -> None:
        super().__init__()
        _check_steps("ACT", cells, halting)
        if not 0 < eps < 1:
            raise ConfigError(f"ACT got eps = {eps}; give a number between 0 and 1, 0.01 as in the paper")
        self.cells, self.halting, self.eps = nn.ModuleList(cells), nn.ModuleList(halting), eps
        self.steps = len(self.cells)

    def start(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, no score yet (rows, 1), and no mean yet."""
        return x, x.new_zeros(x.shape[0], 1), torch.zeros_like(x)

    def step(self, k: int, state: tuple[Tensor, Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The next state, the sum of scores and the mean so far; the answer is that of a row that stops here."""
        x, total, mean = state
        x = self.cells[k](x)
        answer = mean + _spread(1 - total, x) * x
        if k + 1 < self.steps:
            h = _scores(self.halting[k](x), x).sigmoid()
            total, mean = total + h, mean + _spread(h, x) * x
        return (x, total, mean), answer

    def score(self, k: int, state: tuple[Tensor, Tensor, Tensor], answer: Tensor) -> Tensor:
        """The sum of the halting scores, (rows, 1)."""
        return state[1]

    def should_continue(self, k: int, score: Tensor) -> Tensor:
        """While the sum is below 1 - eps, in training too: the paper's gradient goes through means and remainders."""
        return (score < 1 - self.eps).to(score.dtype)


class PonderCost(Objective):
    """N + R, the steps and the remainder, averaged over the batch and summed over the ACT layers of a model.

    Its gradient is -1 for every halting score before the last (Graves 2016, eq. 10-12); N itself has none. Weighted
    with the paper's tau it is a term of the loss: `CrossEntropy() + 0.01 * PonderCost()`.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the halting scores in the trace.

        Raises:
            StructureError: no ACT layer, or one whose halted rows were not computed: use train mode or the dense form.
        """
        costs = []
        for layer, name in trace.names.items():
            if isinstance(layer, ACT):
                costs.append(_ponder(_halting_calls(trace, layer, name)))
        if not costs:
            raise StructureError(f"a ponder cost needs an ACT layer, and the layers are {sorted(trace.names.values())}")
        return torch.stack(costs).sum()

    def __repr__(self) -> str:
        return "PonderCost()"


class PonderNet(Halt):
    """Stops after step n with a probability it has learnt (Banino et al. 2021, arXiv:2107.05407).

    lambda_n = sigmoid(halting_n(state_n)) is the probability to stop at n given that n is reached, so that
    p_n = lambda_n (1 - lambda_1) ... (1 - lambda_{n-1}); the last step takes what is left. In training all steps run,
    keep is the probability to go on, the answer is the mean over p, and costs are expected costs. In eval mode a row
    stops once the probability of having stopped reaches `at`: at the median for 1/2. Rows that stopped are not
    computed.

    Args:
        cells: step n maps the state of step n - 1 to its own; a state is any pytree whose tensors start with the rows.
        exits: after step n, the state to an answer (rows, ...).
        halting: after step n, the state to a halting logit (rows, 1); one for every step but the last.
        at: where the distribution is cut in eval mode. May be changed at any time.

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
            raise ConfigError(f"PonderNet stops at a probability of {at}; give a number between 0 and 1")
        self.cells, self.exits, self.halting = nn.ModuleList(cells), nn.ModuleList(exits), nn.ModuleList(halting)
        self.at, self.steps = at, len(self.cells)

    def start(self, x: Any) -> tuple[Any, Any]:
        """x, and no hazard yet."""
        return x, None

    def step(self, k: int, state: tuple[Any, Any]) -> tuple[tuple[Any, Any], Tensor]:
        """The next state with its hazard -log(1 - lambda), summed over the steps in eval mode; and the answer."""
        x, hazard = state
        x = self.cells[k](x)
        if k + 1 < self.steps:
            more = nn.functional.softplus(_scores(self.halting[k](x), x))
            hazard = more if self.training or hazard is None else hazard + more
        return (x, hazard), self.exits[k](x)

    def score(self, k: int, state: tuple[Any, Any], answer: Tensor) -> Tensor:
        """The hazard (rows, 1): in training that of this step, in eval mode that of all steps so far."""
        return state[1]

    def should_continue(self, k: int, score: Tensor) -> Tensor:
        """In training the probability to go on; in eval mode, while not having stopped is likelier than 1 - `at`."""
        if self.training:
            return (-score).exp()
        return (score < -math.log1p(-self.at)).to(score.dtype)


class PonderLoss(Objective):
    """PonderNet's loss: the expected cross-entropy, and a pull towards stopping geometrically (eq. 5).

    sum over n of p_n CE(y, answer_n) + beta * KL(p || geometric), the geometric distribution with probability `prior`
    cut off after the last step; averaged over the batch. Called as an objective is.

    Args:
        prior: lambda_p: 1 / prior is about the number of steps that a row should take.
        beta: weight of the divergence.
        halt: the name of the PonderNet; None where the model has only one.

    Raises:
        ConfigError: a prior outside (0, 1) or a negative beta.
    """

    def __init__(self, prior: float, beta: float = 0.01, *, halt: str | None = None) -> None:
        if not 0 < prior < 1 or beta < 0:
            raise ConfigError(
                f"PonderLoss got a prior of {prior} and beta = {beta}; give a probability between 0 and 1, and a "
                f"weight of at least 0"
            )
        self.prior, self.beta, self.halt = prior, beta, halt

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """Over the logits (B, C) and hazards in the trace.

        Raises:
            StructureError: no PonderNet or several and none named, or rows that were not computed.
        """
        layer, name = self._layer(trace)
        log_p = log_stopping(trace, layer, name)
        p = log_p.exp()
        losses = [nn.functional.cross_entropy(logits, y, reduction="none") for logits in trace.answers[name]]
        steps = torch.arange(len(losses), device=p.device, dtype=p.dtype)
        log_prior = (steps * math.log1p(-self.prior)).log_softmax(0)
        divergence = (p * (log_p - log_prior)).sum(1)
        return ((p * torch.stack(losses, 1)).sum(1) + self.beta * divergence).mean()

    def _layer(self, trace: Trace) -> tuple[PonderNet, str]:
        found = {name: layer for layer, name in trace.names.items() if isinstance(layer, PonderNet)}
        name = next(iter(found)) if self.halt is None and len(found) == 1 else self.halt
        if name is None or name not in found:
            raise StructureError(
                f"PonderLoss is of one PonderNet and {'none is' if name is None else repr(name) + ' was'} named; this "
                f"model has {sorted(found)}"
            )
        return found[name], name

    def __repr__(self) -> str:
        return f"PonderLoss({self.prior:g}, beta={self.beta:g}, halt={self.halt!r})"


def log_stopping(trace: Trace, layer: PonderNet, name: str) -> Tensor:
    """The logarithm of p, (B, steps): how likely a row stops after its first, second, ... step.

    Raises:
        StructureError: rows that were not computed: use train mode or the dense form.
    """
    scores = [call.decision.score for call in _halting_calls(trace, layer, name)]
    if not scores:  # one step only
        return trace.answers[name][0].new_zeros(trace.answers[name][0].shape[0], 1)
    hazards = torch.cat(scores, 1)
    if not layer.training:
        hazards = hazards.diff(dim=1, prepend=torch.zeros_like(hazards[:, :1]))
    not_before = -(hazards.cumsum(1) - hazards)
    tiny = torch.finfo(hazards.dtype).tiny
    stops = (-torch.expm1(-hazards)).clamp(min=tiny).log()  # log lambda, from -log(1 - lambda)
    return torch.cat([not_before + stops, -hazards.sum(1, keepdim=True)], 1)


def _ponder(calls: list[Call]) -> Tensor:
    """N + R of one layer: the first step and all the remainder, then for every step gone past 1 and minus its score."""
    cost = torch.full((), 2.0)
    for k, call in enumerate(calls):
        score, keep = call.decision.score, call.keep.detach()
        own = score if k == 0 else score - calls[k - 1].decision.score
        cost = cost + (keep * (1 - own)).mean()
    return cost


def _halting_calls(trace: Trace, layer: Halt, name: str) -> list[Call]:
    """The decisions of one pass through a Halt, each about every row."""
    calls, answers = [call for call in trace.calls if call.name == name], trace.answers.get(name, [])
    rows = {call.decision.score.shape[0] for call in calls} | {call.keep.shape[0] for call in calls}
    if len(answers) != len(calls) + 1 or len(rows) > 1:
        raise StructureError(
            f"the loss of {name!r} needs one pass in which every row took every step; this trace has {len(answers)} "
            f"answers and {len(calls)} decisions of {sorted(rows)} rows: use train mode or the dense form, and call it "
            f"once per pass"
        )
    return calls


def _check_steps(what: str, cells: Sequence[nn.Module], halting: Sequence[nn.Module]) -> None:
    if not cells or len(halting) != len(cells) - 1:
        raise StructureError(
            f"{what} needs at least one cell, and a halting module after each but the last; got {len(cells)} cells and "
            f"{len(halting)} halting modules"
        )


def _spread(weight: Tensor, x: Tensor) -> Tensor:
    """(rows, 1) against (rows, ...)."""
    return weight.reshape(weight.shape[0], *[1] * (x.dim() - 1))


def _scores(score: Tensor, state: Any) -> Tensor:
    rows = tree_leaves(state)[0].shape[0]
    if score.shape != (rows, 1):
        raise StructureError(
            f"a halting module answered scores of shape {tuple(score.shape)} for {rows} rows; expected one each, "
            f"({rows}, 1)"
        )
    return score
