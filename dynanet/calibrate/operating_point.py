"""Operating points: thresholds for a budget, computed from a table, with their cost and accuracy there."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dynanet.calibrate.budgeted import leaving, outcome
from dynanet.calibrate.risk import GRID_SHARE, certified, common_levels, is_binary, least_samples, lost_answers
from dynanet.calibrate.table import ExitTable
from dynanet.calibrate.thresholds import SLACK, ThresholdSearch
from dynanet.core.budget import Budget
from dynanet.core.errors import BudgetError, DataError


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """Thresholds for a budget, with their cost and accuracy on the held-out samples.

    Attributes:
        budget: the requested budget.
        thresholds: (K - 1,), +inf: no sample leaves at this exit, -inf: all do.
        limit: at most this many steps run, for the hard cap; None: no cap.
        macs: mean per sample.
        ms: mean per sample; None where not measured.
        accuracy: on the held-out samples.
        share: (K,) of the samples that leave at every exit.
        promised: whether the risk is promised; None: the budget has none.
        note: a caveat for the user; usually "".
    """

    budget: Budget
    thresholds: np.ndarray
    limit: int | None
    macs: float
    ms: float | None
    accuracy: float
    share: np.ndarray
    promised: bool | None
    note: str

    @classmethod
    def of(
        cls,
        table: ExitTable,
        budget: Budget,
        thresholds: np.ndarray,
        *,
        limit: int | None = None,
        promised: bool | None = None,
        note: str = "",
    ) -> "OperatingPoint":
        """The operating point of given thresholds on a table; arguments as the attributes."""
        done = outcome(table, thresholds)
        return cls(budget, thresholds, limit, done.macs, done.ms, done.accuracy, done.share, promised, note)

    def __str__(self) -> str:
        spent = f"{self.macs:,.0f} MACs" + ("" if self.ms is None else f", {self.ms:.3g} ms")
        shares = " ".join(f"{share:.0%}" for share in self.share)
        promise = {None: "", True: "; risk promised", False: "; risk NOT promised"}[self.promised]
        note = f"\n  {self.note}" if self.note else ""
        return f"{self.budget}: {spent} per sample, accuracy {self.accuracy:.2%}, exits {shares}{promise}{note}"


def choose(table: ExitTable, budget: Budget, losses: np.ndarray | None = None) -> OperatingPoint:
    """The operating point for a budget.

    Without a risk: the highest held-out accuracy within the mean cost (`calibrate.thresholds`). With a risk: of a
    family of thresholds fixed in advance, those that exit earliest among those whose expected loss is certified
    (`calibrate.risk`). With a risk and a mean cost: those that exit latest among those for which both are certified,
    jointly with the confidence (Bonferroni). A cap limits the number of steps, whatever the scores are.

    Args:
        table: of held-out data.
        budget: the requested limits.
        losses: (N, K), at most 1, the loss of the answer of every exit; for budgets with a risk. None:
            `risk.lost_answers`, 1 where the early answer is wrong and the whole model's is right. For the difference of
            accuracies give `table.correct[:, -1:].astype(float) - table.correct`.

    Raises:
        BudgetError: below the cheapest or above the most expensive path, with the possible range; ms that were not
            measured; a risk and a cost that cannot both be promised; losses without a risk.
        DataError: losses of another shape.
    """
    if losses is not None and budget.risk is None:
        raise BudgetError("got losses for a budget without a risk; add risk=, or leave them out")
    losses = lost_answers(table) if losses is None else np.asarray(losses, dtype=np.float64)
    if losses.shape != table.correct.shape:
        raise DataError(
            f"losses must have shape {(table.samples, table.exits)}, one per sample and exit, got {losses.shape}"
        )
    limit = None if budget.cap_macs is None else _limit(table, budget.cap_macs)
    cut = table if limit is None else table.first(limit)
    bounds = {name: bound for name in ("macs", "ms") if (bound := getattr(budget, name)) is not None}
    for name, bound in bounds.items():
        _check_reachable(cut, name, bound)
    promised: bool | None = None
    note = ""
    if budget.risk is not None:
        thresholds, promised, note = _promised(cut, losses[:, : cut.exits], budget.risk, budget.confidence, bounds)
    elif bounds and cut.exits > 1:
        thresholds, note = _within(cut, bounds)
    else:
        thresholds = _never(cut)
    if cut.exits < table.exits:
        thresholds = np.concatenate([thresholds, [-np.inf], np.full(table.exits - 1 - cut.exits, np.inf)])
    return OperatingPoint.of(table, budget, thresholds, limit=limit, promised=promised, note=note)


def curve(table: ExitTable, points: int = 25) -> list[OperatingPoint]:
    """Operating points from the cheapest path to the most expensive, at budgets evenly spaced in MACs."""
    cost = _cost(table, "macs")
    search = _search(table, "macs")
    found = []
    for macs in np.linspace(*_range(cost), points):
        thresholds = search.best_within(macs)
        note = _leftover(table, thresholds, {"macs": macs})
        found.append(OperatingPoint.of(table, Budget(macs=macs), thresholds, note=note))
    return found


@lru_cache(maxsize=2)  # all budgets of a table share one search, whose hull is most of the work
def _search(table: ExitTable, name: str) -> ThresholdSearch:
    """The search for thresholds within a mean cost: "macs" or "ms"."""
    return ThresholdSearch(table.scores, table.correct.astype(np.float64), _cost(table, name))


def _within(table: ExitTable, bounds: dict[str, float]) -> tuple[np.ndarray, str]:
    """(thresholds, note) within bounds on mean costs.

    Thresholds for one bound alone if they keep the others too, else for a common bound that implies all of them.
    """
    for name, bound in bounds.items():
        thresholds = _search(table, name).best_within(bound)
        if all(_spent(table, thresholds, other) <= most * (1 + SLACK) for other, most in bounds.items()):
            return thresholds, _leftover(table, thresholds, bounds)
    # The mean of a maximum is at least the maximum of the means, so this bound implies all of them.
    shares = np.maximum.reduce([_cost(table, name) / bound for name, bound in bounds.items()])
    if _range(shares)[0] > 1 + SLACK:
        raise BudgetError(f"found no thresholds within all of {bounds} together; raise one of them")
    thresholds = ThresholdSearch(table.scores, table.correct.astype(np.float64), shares).best_within(1.0)
    return thresholds, _leftover(table, thresholds, bounds)


def _promised(
    table: ExitTable, losses: np.ndarray, risk: float, confidence: float, bounds: dict[str, float]
) -> tuple[np.ndarray, bool, str]:
    """(thresholds, promised, note) for a risk, optionally with bounds on mean costs."""
    delta = (1 - confidence) / (1 + len(bounds))
    # Shuffled: the betting bound reads the samples in order, and files are often sorted by class.
    order = np.random.default_rng(0).permutation(table.samples)
    chooses, tests = np.split(order, [math.ceil(GRID_SHARE * table.samples)])
    family = common_levels(table.scores[chooses])
    exits = np.stack([leaving(table.scores[tests], thresholds) for thresholds in family], 1)
    tested = np.take_along_axis(losses[tests], exits, 1)
    safe = certified(tested, risk, delta)  # family[:safe] keep the risk
    promise = f"a risk of {risk:g} with confidence {confidence:g}"
    note = ""
    if safe < min(2, len(family)):  # family[0] never exits early
        why = _why_not(tested, safe, risk, delta, table.samples)
        note = f"never exits early: {promise} cannot be promised for any early exit; {why}"
        if not bounds:
            return _never(table), safe == 1, note
    cheap = 0  # family[cheap:] keep the mean costs
    for name, bound in bounds.items():
        most_expensive = table.most_expensive[-1] if name == "macs" else _cost(table, name).max()
        costs = np.minimum(np.take_along_axis(_cost(table, name)[tests], exits, 1) / most_expensive, 1.0)
        if bound < most_expensive:
            cheap = max(cheap, len(family) - certified(costs[:, ::-1], bound / most_expensive, delta))
    if cheap >= safe and note:
        raise BudgetError(f"{note}. Mean costs of {bounds} need early exits; drop the risk or the cost")
    if cheap >= safe:
        spends = ", ".join(f"{_spent(table, family[safe - 1], name):.6g} {name}" for name in bounds)
        raise BudgetError(
            f"{promise} and mean costs of {bounds} cannot be promised together: this risk takes about {spends}; allow "
            f"more risk or more cost, or give more held-out samples"
        )
    return family[cheap if bounds else safe - 1], True, note


def _why_not(tested: np.ndarray, safe: int, risk: float, delta: float, samples: int) -> str:
    """Why no early exit is certified on the tested losses (n, L), and what would help."""
    needed = least_samples(risk, delta, binary=is_binary(tested))
    if len(tested) < needed:
        enough = math.ceil(needed / (1 - GRID_SHARE)) + 1
        return f"{samples} held-out samples are too few; give at least {enough}"
    if safe == 0:
        return f"without any early exit the held-out loss is {tested[:, 0].mean():.3g}; allow more than that"
    return f"the loss of the most confident early answers is too high or too uncertain with {samples} samples"


def _limit(table: ExitTable, cap: float) -> int:
    """How many steps a hard cap allows."""
    steps = int((table.most_expensive <= cap * (1 + SLACK)).sum())
    if steps == 0:
        raise BudgetError(f"cap_macs must be at least {table.most_expensive[0]:.6g}, the first exit; got {cap:.6g}")
    return steps


def _check_reachable(table: ExitTable, name: str, bound: float) -> None:
    low, high = _range(_cost(table, name))
    if low * (1 - SLACK) <= bound <= high * (1 + SLACK):
        return
    where = "below the cheapest" if bound < low else "above the most expensive"
    raise BudgetError(f"{name}={bound:.6g} is {where} path of this model; give a number from {low:.6g} to {high:.6g}")


def _leftover(table: ExitTable, thresholds: np.ndarray, bounds: dict[str, float]) -> str:
    if any(_spent(table, thresholds, name) >= 0.95 * bound for name, bound in bounds.items()):
        return ""
    return "part of the budget is unused: with more, the held-out accuracy falls, or tied scores do not fit"


def _cost(table: ExitTable, name: str) -> np.ndarray:
    """(N, K) of leaving at every exit."""
    cost = table.macs if name == "macs" else table.ms
    if cost is None:
        raise BudgetError("a budget in ms needs measured times: use frontier.timed(ms), or give Budget(macs=...)")
    return np.broadcast_to(cost, table.correct.shape)


def _range(cost: np.ndarray) -> tuple[float, float]:
    means = cost.mean(0)
    return float(means.min()), float(means.max())


def _spent(table: ExitTable, thresholds: np.ndarray, name: str) -> float:
    return float(_cost(table, name)[np.arange(table.samples), leaving(table.scores, thresholds)].mean())


def _never(table: ExitTable) -> np.ndarray:
    return np.full(table.exits - 1, np.inf)
