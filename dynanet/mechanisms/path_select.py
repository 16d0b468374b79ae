"""Path selection: every row runs the branches that a gate picks for it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, Kept
from dynanet.core.errors import BudgetError, ConfigError, StructureError
from dynanet.core.gate import Gate, check_units
from dynanet.core.objective import Objective
from dynanet.core.rows import over_tensors
from dynanet.core.trace import Trace
from dynanet.gates.rules import RelaxedTopK

Mix = Callable[[Decision], Tensor]


def summed(decision: Decision) -> Tensor:
    """Weights of 1: the sum of the kept branches. For gates that open any number of paths."""
    return torch.ones_like(decision.keep)


def averaged(decision: Decision) -> Tensor:
    """Weights for the mean of the kept branches; with soft keeps, for their weighted mean."""
    total = decision.keep.sum(-1, keepdim=True)
    return (1 / torch.where(total > 0, total, 1)).expand_as(decision.keep)


def by_score(decision: Decision) -> Tensor:
    """Weights by a softmax of the scores over the kept branches."""
    keep, score = decision
    best = torch.where(keep > 0, score, score.amin(-1, keepdim=True)).amax(-1, keepdim=True)
    odds = (score - best).clamp(max=0).exp()  # branches that are not kept must not overflow
    total = (keep * odds).sum(-1, keepdim=True)
    return odds / torch.where(total > 0, total, 1)


class PathSelect(Dynamic):
    """Runs a branch only for the rows that pick it: the sum over branches of keep * mix * branch(x).

    Multi-branch routing (survey: Han et al. 2021, arXiv:2102.04906, sec. 2.1.3; soft gates on several paths under a
    budget: Li et al. 2020, arXiv:2003.10401). Branches may differ in kind and price; unit u is branch u. In training
    every branch sees every row and the answers are blended. Rows are samples, or leading axes (B, T) that do not
    interact within a branch.

    Args:
        branches: map rows to answers (tensors or pytrees) of one shape.
        gate: maps x to a Decision with one score per branch. With `RelaxedTopK` every row keeps the same number of
            branches, with a `BinaryRule` any number.
        mix: maps the Decision to weights (rows..., branches) of the answers: `averaged`, `summed` or `by_score`. All
            three give 1 where one branch is kept.
        otherwise: always computed, and the answer of a row that keeps no branch; in training its weight is 1 minus the
            sum of keep, if that is positive. Zeros if None.

    Raises:
        StructureError: fewer than two branches, or a gate for another number of them.
        ConfigError: a `RelaxedTopK` that keeps more branches than there are, or has another number of costs.
    """

    def __init__(
        self, branches: Sequence[nn.Module], gate: nn.Module, *, mix: Mix = averaged, otherwise: nn.Module | None = None
    ) -> None:
        super().__init__()
        if len(branches) < 2:
            raise StructureError(f"path selection got {len(branches)} branches; give two or more, or use layer skip")
        check_units(gate, len(branches), "branches")
        if isinstance(gate, Gate) and isinstance(gate.rule, RelaxedTopK):
            self.max_units = gate.rule.k
        self.branches, self.gate = nn.ModuleList(branches), gate
        self.mix, self.otherwise = mix, otherwise

    def forward(self, x: Any) -> Any:
        """The mixed answers of the picked branches, (rows..., ...)."""
        decision = self.tap(self.gate(x))
        keep = decision.keep
        shares = keep * self.mix(decision)
        lead = keep.shape[:-1]
        answer = None
        if self.otherwise is not None:
            missing = (1 - keep.sum(-1)).clamp(min=0)
            answer = over_tensors(lambda t: (t * _over(missing, t)).flatten(0, len(lead) - 1), self.otherwise(x))
        for u, branch in enumerate(self.branches):
            with self.only(u, keep[..., u]) as kept:
                if kept.empty:
                    continue
                y = kept.call(branch, x)
            share = kept.take(shares[..., u])
            y = over_tensors(lambda t, share=share: t * _over(share, t), y)
            answer = _added(kept, y, answer)
        if answer is None:  # no row kept a branch: run one without rows, for the shape of the answer
            with self.only(0, keep[..., 0]) as kept:
                y = kept.call(self.branches[0], x)
            answer = over_tensors(lambda t: t.new_zeros(lead.numel(), *t.shape[1:]), y)
        return over_tensors(lambda t: t.reshape(*lead, *t.shape[1:]), answer)


@dataclass(frozen=True)
class PathBalance(Objective):
    """Penalises branches that are picked more often than others: `CrossEntropy() + PathBalance(0.01)`.

    The squared coefficient of variation of the branches' mean keeps (the importance loss of Shazeer et al. 2017,
    arXiv:1701.06538, eq. 6-7), summed over the PathSelect layers. It keeps a gate from settling on one branch before
    the others have learned; give it a small weight, or drop it later, where branches differ in price on purpose.

    Args:
        weight: of the term.

    Raises:
        ConfigError: a negative weight.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ConfigError(f"weight must be at least 0, got {self.weight}")

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The penalty, a scalar; 0 when balanced.

        Raises:
            StructureError: no path selection decided in this pass.
        """
        keeps: dict[str, list[Tensor]] = {}
        for call in trace.decisions(PathSelect):
            keeps.setdefault(call.name, []).append(call.keep.flatten(0, -2))
        terms = []
        for of_layer in keeps.values():
            taken = torch.cat(of_layer).sum(0)
            terms.append(taken.var(correction=0) / taken.mean().square().clamp(min=1e-12))
        return self.weight * torch.stack(terms).sum()


def price_for(score: Tensor, costs: Sequence[float] | Tensor, mean_cost: float, *, k: int = 1) -> float:
    """The smallest `RelaxedTopK.price` at which the mean cost of rows is at most `mean_cost`.

    Fit it on held-out data: record a pass, and give the scores of the Decision.

    Args:
        score: (rows..., branches), as the scorer of the gate returns them.
        costs: (branches,), those of the rule.
        mean_cost: per row, in units of `costs`.
        k: branches per row.

    Raises:
        BudgetError: a mean cost below that of the k cheapest branches.
        ConfigError: another number of costs than of scores, or fewer than k branches.
    """
    score = score.detach().flatten(0, -2)
    rule = RelaxedTopK(k, costs=costs).to(score).eval()  # rounds as the model does
    rule.check(score.shape[-1])
    prices = torch.as_tensor(costs, dtype=torch.float64, device=score.device)
    least = prices.sort().values[:k].sum().item()
    if not mean_cost >= least:
        raise BudgetError(f"a mean cost of {mean_cost:g} is below the {least:g} of the {k} cheapest; raise it")

    def cost(price: float) -> float:
        rule.price.fill_(price)
        return (rule(score) * prices).sum(-1).mean().item()

    if cost(0.0) <= mean_cost:
        return 0.0
    # Bisection, as the mean cost never rises with the price. At the upper end the cheapest branches win everywhere.
    gaps = prices.sort().values.diff()
    low = 0.0
    high = 2 * (score.amax() - score.amin()).item() / gaps[gaps > 0].min().item()
    for _ in range(100):
        middle = (low + high) / 2
        if cost(middle) <= mean_cost:
            high = middle
        else:
            low = middle
    return high


def _added(kept: Kept, y: Any, answer: Any) -> Any:
    """Add the answer of a branch to the sum so far, whose rows are along one axis.

    In place in the sparse form, where a copy of all rows per branch would cost more than a small branch.
    """
    if answer is None:
        rows = math.prod(kept.lead)
        if kept.index is None or kept.index.numel() == rows:
            return y
        answer = over_tensors(lambda t: t.new_zeros(rows, *t.shape[1:]), y)
    if kept.index is None:
        return over_tensors(torch.add, answer, y)
    return over_tensors(lambda a, t: a.index_add_(0, kept.index, t.to(a.dtype)), answer, y)


def _over(share: Tensor, t: Tensor) -> Tensor:
    """A factor per row, in the dtype of t, reshaped to multiply t."""
    return share.to(t.dtype).reshape(*share.shape, *[1] * (t.dim() - share.dim()))
