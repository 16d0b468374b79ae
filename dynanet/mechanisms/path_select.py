"""Path selection: of several branches, every row runs those that a gate picks for it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, Kept
from dynanet.core.errors import BudgetError, ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.rows import over_tensors
from dynanet.core.trace import Trace
from dynanet.gates.rules import RelaxedTopK

Mix = Callable[[Decision], Tensor]


def summed(decision: Decision) -> Tensor:
    """Each kept branch counts once: the sum. For gates that open any number of paths."""
    return torch.ones_like(decision.keep)


def averaged(decision: Decision) -> Tensor:
    """The mean of the kept branches; with soft keeps, their weighted mean."""
    total = decision.keep.sum(-1, keepdim=True)
    return (1 / torch.where(total > 0, total, 1)).expand_as(decision.keep)


def by_score(decision: Decision) -> Tensor:
    """A softmax of the scores over the kept branches: the surer the gate, the more a branch counts."""
    keep, score = decision
    best = torch.where(keep > 0, score, score.amin(-1, keepdim=True)).amax(-1, keepdim=True)
    odds = (score - best).clamp(max=0).exp()  # the clamp is for what is not kept: it must not become infinite
    total = (keep * odds).sum(-1, keepdim=True)
    return odds / torch.where(total > 0, total, 1)


class PathSelect(Dynamic):
    """Runs a branch only for the rows that pick it: the sum over branches of keep * mix * branch(x).

    Multi-branch routing (survey: Han et al. 2021, arXiv:2102.04906, sec. 2.1.3; soft gates on several paths under a
    budget: Li et al. 2020, arXiv:2003.10401). Branches may differ in kind and price; unit u is branch u. In training
    every branch sees every row and the answers are blended. Rows are samples, or leading axes (B, T) that do not touch
    each other in a branch.

    Args:
        branches: map rows to answers (tensors or pytrees) of one shape.
        gate: maps x to a Decision with one score per branch; with `RelaxedTopK` every row keeps the same number of
            branches, with the rules of `dynanet.gates.rules` any number.
        mix: what a kept branch's answer is multiplied with, (rows..., branches), from the Decision that holds:
            `averaged`, `summed` or `by_score`. All three are 1 where one branch is kept.
        otherwise: always computed, and the answer of a row that keeps no branch; in training it counts 1 minus the sum
            of the keeps, if that is positive. Zeros if None.

    Raises:
        StructureError: fewer than two branches, or a gate for another number of them.
        ConfigError: a `RelaxedTopK` that wants more branches than there are, or has costs of another number.
    """

    def __init__(
        self,
        branches: Sequence[nn.Module],
        gate: nn.Module,
        *,
        mix: Mix = averaged,
        otherwise: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if len(branches) < 2:
            raise StructureError(f"path selection got {len(branches)} branches; give two or more, or use layer skip")
        if isinstance(gate, Gate):
            if gate.units != len(branches):
                raise StructureError(
                    f"path selection got {len(branches)} branches and a gate for {gate.units} units; give "
                    f"Gate(scorer, rule, units={len(branches)})"
                )
            if isinstance(gate.rule, RelaxedTopK):
                self.max_units = gate.rule.k
        self.branches, self.gate, self.mix, self.otherwise = nn.ModuleList(branches), gate, mix, otherwise

    def forward(self, x: Any) -> Any:
        """The picked branches' answers, mixed."""
        decision = self.tap(self.gate(x))
        keep, shares = decision.keep, decision.keep * self.mix(decision)
        lead, answer = keep.shape[:-1], None
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
        if answer is None:  # no row kept a branch; one without rows says what shape answers have
            with self.only(0, keep[..., 0]) as kept:
                y = kept.call(self.branches[0], x)
            answer = over_tensors(lambda t: t.new_zeros(lead.numel(), *t.shape[1:]), y)
        return over_tensors(lambda t: t.reshape(*lead, *t.shape[1:]), answer)


class PathBalance(Objective):
    """Term of a loss: every branch of every path selection is to be taken equally often.

    The squared coefficient of variation of the branches' mean keeps (the importance loss of Shazeer et al. 2017,
    arXiv:1701.06538, eq. 6-7), summed over the layers. Keeps a gate from settling on one branch before the others have
    learned anything; let it go, or weigh it little, where branches differ in price on purpose.

    Adds to the objectives of `dynanet.train`: `CrossEntropy() + PathBalance(0.01)`.

    Args:
        weight: of the term.
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not weight >= 0:
            raise ConfigError(f"PathBalance got a weight of {weight}, which would draw rows together; give 0 or more")
        self.weight = weight

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The penalty, a scalar; 0 when balanced.

        Raises:
            StructureError: no path selection decided in this pass.
        """
        names = [name for layer, name in trace.names.items() if isinstance(layer, PathSelect) and trace[name]]
        if not names:
            raise StructureError(
                "no path selection decided in this pass, so there is nothing to balance; drop the term"
            )
        terms = []
        for name in names:
            taken = torch.cat([keep.flatten(0, -2) for keep in trace[name]]).sum(0)
            terms.append(taken.var(correction=0) / taken.mean().square().clamp(min=1e-12))
        return self.weight * torch.stack(terms).sum()

    def __repr__(self) -> str:
        return f"PathBalance({self.weight:g})"


def price_for(score: Tensor, costs: Sequence[float] | Tensor, mean_cost: float, *, k: int = 1) -> float:
    """The smallest price at which rows like these cost no more than `mean_cost`, for `RelaxedTopK.price`.

    Fit it on held-out data that was not trained on: record a pass, and give the Decision's scores.

    Args:
        score: (rows..., branches), as the gate's scorer answers.
        costs: (branches,), as the rule has them.
        mean_cost: of a row, in units of `costs`.
        k: branches per row.

    Raises:
        BudgetError: a mean cost below that of the k cheapest branches.
        ConfigError: costs of another number than scores, or k branches of fewer.
    """
    score = score.detach().flatten(0, -2)
    rule = RelaxedTopK(k, costs=costs).to(score).eval()  # rounds as the model will that made these scores
    rule.check(score.shape[-1])
    prices = torch.as_tensor(costs, dtype=torch.float64, device=score.device)
    least = prices.sort().values[:k].sum().item()
    if not mean_cost >= least:
        raise BudgetError(f"a mean cost of {mean_cost:g} is below the {least:g} of the {k} cheapest; ask for more")

    def cost(price: float) -> float:
        rule.price.fill_(price)
        return (rule(score) * prices).sum(-1).mean().item()

    if cost(0.0) <= mean_cost:
        return 0.0
    gaps = prices.sort().values.diff()
    low, high = 0.0, 2 * (score.amax() - score.amin()).item() / gaps[gaps > 0].min().item()
    for _ in range(100):  # the mean cost never rises with the price
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= mean_cost else (middle, high)
    return high


def _added(kept: Kept, y: Any, answer: Any) -> Any:
    """The sum so far, rows along one axis, with a branch's part added. In the sparse form in place: a copy of all rows
    for every branch would cost more than a small branch.
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
    """A factor per row, in t's dtype, with axes to be multiplied over t's."""
    return share.to(t.dtype).reshape(*share.shape, *[1] * (t.dim() - share.dim()))
