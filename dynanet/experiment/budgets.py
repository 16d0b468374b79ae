"""The budgets of a run, and the operating points that are chosen for them."""

from collections.abc import Sequence
from dataclasses import dataclass

from dynanet.calibrate.frontier import Frontier
from dynanet.calibrate.operating_point import OperatingPoint
from dynanet.core.budget import Budget
from dynanet.core.errors import BudgetError, ConfigError
from dynanet.report.words import short_percent

SHARES = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class RequestedBudgets:
    """The budgets of a run.

    Attributes:
        shares: of the full model's MACs; None: those of `SHARES` that a path of the model is cheap enough for.
        risk: share of samples that may lose the full model's right answer; None: no such budget.
        confidence: with which the risk is promised.
    """

    shares: Sequence[float] | None = None
    risk: float | None = 0.05
    confidence: float = 0.9

    def __post_init__(self) -> None:
        for value in (*(self.shares or ()), self.confidence, *([] if self.risk is None else [self.risk])):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"a budget is {value!r}; expected a number")


def operating_points(frontier: Frontier, requested: RequestedBudgets) -> list[OperatingPoint]:
    """The best thresholds for each budget.

    Raises:
        BudgetError: a share that no path of the model has.
    """
    shares = requested.shares
    if shares is None:
        shares = [share for share in SHARES if share > cheapest_share(frontier)]
    points = [frontier.choose(budget_of(frontier, share)) for share in shares]
    if requested.risk is not None and frontier.table.groups is None:  # positions of an image are not independent
        points.append(frontier.choose(Budget(risk=requested.risk, confidence=requested.confidence)))
    return points


def budget_of(frontier: Frontier, share: float) -> Budget:
    """The budget of a share of the full model's MACs.

    Raises:
        BudgetError: no path of the model has this share.
    """
    full = full_macs(frontier)
    low, high = frontier.table.mean_macs[[0, -1]] / full
    if not low * (1 - 1e-9) <= share <= high * (1 + 1e-9):
        where = "above the most expensive" if share > high else "below the cheapest"
        raise BudgetError(
            f"a share of {share:g} is {where} path: this model can spend {low:.3f} to {high:.3f} of its full MACs; ask "
            f"within that"
        )
    return Budget(macs=share * full)


def full_macs(frontier: Frontier) -> float:
    """MACs per sample of the full model: what shares are shares of."""
    return float(frontier.table.most_expensive[-1])


def cheapest_share(frontier: Frontier) -> float:
    """The share of the full model's MACs that the first exit takes."""
    return float(frontier.table.mean_macs[0]) / full_macs(frontier)


def in_words(budget: Budget, full: float) -> str:
    """A budget as text: "50 % of the MACs".

    Args:
        budget: with a risk, or with MACs.
        full: MACs of the full model.
    """
    if budget.risk is not None:
        return f"risk {short_percent(budget.risk)}, confidence {short_percent(budget.confidence)}"
    assert budget.macs is not None
    return f"{short_percent(budget.macs / full)} of the MACs"


def described(point: OperatingPoint, full: float) -> str:
    """An operating point in a line, its budget as a share of `full` MACs."""
    return str(point).replace(str(point.budget), in_words(point.budget, full), 1)
