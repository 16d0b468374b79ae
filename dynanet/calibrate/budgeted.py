"""Budgeted batch classification: from the share of samples of every exit to thresholds.

The protocol of MSDNet (Huang et al. 2018, arXiv:1703.09844, section 4.2), with two corrections. A threshold cannot
separate samples whose scores are tied: here they leave only if all of them fit into the share (in the reference all
leave, 0.75 of the samples where the share was 0.20). And an `Outcome` holds the shares and costs that were reached.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dynanet.calibrate.table import ExitTable
from dynanet.core.errors import BudgetError, DataError

PAPER_RATIOS = tuple(p / 20 for p in range(1, 40))


@dataclass(frozen=True, eq=False)
class Outcome:
    """Cost, accuracy and exit shares of thresholds on a table.

    Attributes:
        macs: mean per sample.
        ms: mean per sample; None where the table has none.
        accuracy: share of correct answers.
        share: (K,) of the samples that leave at every exit.
    """

    macs: float
    ms: float | None
    accuracy: float
    share: np.ndarray


def leaving(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """The exit of every sample, (N,) int64: the first whose score is not below its threshold, else the last.

    Args:
        scores: (N, K - 1).
        thresholds: (K - 1,); +inf: no sample leaves, -inf: all do.
    """
    last = np.ones((len(scores), 1), bool)
    return np.concatenate([scores >= thresholds, last], 1).argmax(1)


def outcome(table: ExitTable, thresholds: np.ndarray) -> Outcome:
    """The outcome of thresholds (K - 1,) on a table of held-out or test data.

    Raises:
        DataError: not one threshold per exit but the last.
    """
    if np.shape(thresholds) != (table.exits - 1,):
        raise DataError(
            f"thresholds must have shape {(table.exits - 1,)} for a table of {table.exits} exits, got "
            f"{np.shape(thresholds)}"
        )
    exits = leaving(table.scores, thresholds)
    rows = np.arange(table.samples)
    macs = table.macs[exits] if table.macs.ndim == 1 else table.macs[rows, exits]
    return Outcome(
        macs=float(macs.mean()),
        ms=None if table.ms is None else float(table.ms[exits].mean()),
        accuracy=float(table.correct[rows, exits].mean()),
        share=np.bincount(exits, minlength=table.exits) / table.samples,
    )


def geometric(exits: int, ratio: float) -> np.ndarray:
    """Shares (K,) that grow by a ratio from exit to exit, p_k ~ ratio^k: below 1 most leave early, above 1 late.

    >>> geometric(5, 1.0)
    array([0.2, 0.2, 0.2, 0.2, 0.2])

    Raises:
        BudgetError: a ratio that is not positive and finite.
    """
    if not 0 < ratio < np.inf:
        raise BudgetError(f"ratio must be above 0 and finite, got {ratio!r}")
    log = np.arange(exits) * np.log(ratio)
    share = np.exp(log - log.max())
    return share / share.sum()


def thresholds_for_share(scores: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Thresholds (K - 1,) at which the most confident samples leave at every exit, never more than its share.

    Without ties every exit but the last gets its share to within 1/N. Tied samples that do not fit continue to later
    exits.

    Args:
        scores: (N, K - 1) of held-out data.
        share: (K,), adds up to 1.

    Raises:
        BudgetError: shares that are negative or do not add up to 1.
    """
    if share.shape != (scores.shape[1] + 1,) or (share < 0).any() or abs(share.sum() - 1) > 1e-6:
        raise BudgetError(
            f"expected {scores.shape[1] + 1} shares of at least 0 that add up to 1, got {np.round(share, 4)}"
        )
    thresholds = np.full(scores.shape[1], np.inf)
    stay = np.ones(len(scores), bool)
    for k, p in enumerate(share[:-1]):
        quota = int(np.floor(len(scores) * p + 1e-9))
        highest = np.sort(scores[stay, k])[::-1]
        if quota >= len(highest):
            thresholds[k] = -np.inf
        elif quota > 0:
            above = highest[:quota][highest[:quota] > highest[quota]]  # not tied with the first that must stay
            thresholds[k] = above[-1] if len(above) else np.inf
        stay &= scores[:, k] < thresholds[k]
    return settled(scores, thresholds)


def settled(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Equivalent thresholds, half way between the lowest score that leaves and the highest that stays.

    With that margin, the rounding of another engine does not change decisions. Where no sample leaves the threshold is
    +inf, where none stays it is -inf.
    """
    best = np.full(len(thresholds), np.inf)
    stay = np.ones(len(scores), bool)
    for k, threshold in enumerate(thresholds):
        leave = stay & (scores[:, k] >= threshold)
        stay = stay & ~leave
        if leave.any() and not stay.any():
            best[k] = -np.inf
        elif leave.any():
            best[k] = _between(scores[stay, k].max(), scores[leave, k].min())
    return best


def budgeted_batch(held_out: ExitTable, test: ExitTable, ratios: Iterable[float] = PAPER_RATIOS) -> list[Outcome]:
    """The paper's curve: for every ratio, thresholds from the held-out table and their outcome on the test table."""
    shares = [geometric(held_out.exits, ratio) for ratio in ratios]
    return [outcome(test, thresholds_for_share(held_out.scores, share)) for share in shares]


def _between(below: float, above: float) -> float:
    """A number in (below, above]: their middle in float32, the dtype of a model's thresholds."""
    middle = float(np.float32((below + above) / 2))
    return middle if below < middle <= above else float(above)
