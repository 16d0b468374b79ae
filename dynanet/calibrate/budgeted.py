"""Budgeted batch classification: a share of the samples for every exit, and the thresholds that let this share leave.

The protocol of MSDNet (Huang et al. 2018, arXiv:1703.09844, section 4.2), with two repairs. Samples whose scores are
tied cannot be told apart by a threshold: they stay together, and leave only if all of them fit into the share (the
reference lets all of them go: it was asked for 0.20 and gave 0.75). And what was reached is said beside what was asked.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dynanet.calibrate.table import ExitTable
from dynanet.core.errors import BudgetError, DataError

PAPER_RATIOS = tuple(p / 20 for p in range(1, 40))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What thresholds do on a table.

    Attributes:
        macs: per sample, in the mean.
        ms: per sample, in the mean; None where the table has none.
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
        thresholds: (K - 1,); +inf: nobody leaves, -inf: everybody.
    """
    last = np.ones((len(scores), 1), bool)
    return np.concatenate([scores >= thresholds, last], 1).argmax(1)


def outcome(table: ExitTable, thresholds: np.ndarray) -> Outcome:
    """Cost, accuracy and shares of a table under thresholds (K - 1,): of held-out data, or of test data."""
    if np.shape(thresholds) != (table.exits - 1,):
        raise DataError(f"thresholds of shape {np.shape(thresholds)} for a table of {table.exits} exits")
    exits, rows = leaving(table.scores, thresholds), np.arange(table.samples)
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
        BudgetError: a ratio that is not positive.
    """
    if not 0 < ratio < np.inf:
        raise BudgetError(f"ratio={ratio!r}; the shares of the exits need a ratio above 0")
    log = np.arange(exits) * np.log(ratio)
    share = np.exp(log - log.max())
    return share / share.sum()


def thresholds_for_share(scores: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Thresholds (K - 1,) that let the surest samples leave at every exit, never more than its share.

    Without ties every exit but the last gets its share to within 1/N. What ties hold back goes on to later exits.

    Args:
        scores: (N, K - 1) of held-out data.
        share: (K,), adds up to 1.

    Raises:
        BudgetError: shares that are negative or do not add up to 1.
    """
    if share.shape != (scores.shape[1] + 1,) or (share < 0).any() or abs(share.sum() - 1) > 1e-6:
        raise BudgetError(f"shares {np.round(share, 4)} for {scores.shape[1] + 1} exits; they must add up to 1")
    thresholds = np.full(scores.shape[1], np.inf)
    stay = np.ones(len(scores), bool)
    for k, p in enumerate(share[:-1]):
        quota = int(np.floor(len(scores) * p + 1e-9))
        surest = np.sort(scores[stay, k])[::-1]
        if quota >= len(surest):
            thresholds[k] = -np.inf
        elif quota > 0:
            apart = surest[:quota][surest[:quota] > surest[quota]]  # those not tied with the first who must stay
            thresholds[k] = apart[-1] if len(apart) else np.inf
        stay &= scores[:, k] < thresholds[k]
    return settled(scores, thresholds)


def settled(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Thresholds for the same exits, as far as can be from the scores that reach them.

    Half way between the least sure sample that leaves and the surest that stays, another engine's rounding changes
    nothing. Where none leaves the exit is switched off (+inf), where none stays the rest of the model is (-inf).
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
    """The paper's curve: for every ratio, thresholds from the held-out scores and their outcome on the test table."""
    shares = [geometric(held_out.exits, ratio) for ratio in ratios]
    return [outcome(test, thresholds_for_share(held_out.scores, share)) for share in shares]


def _between(below: float, above: float) -> float:
    """In (below, above]: their middle in float32, because models hold thresholds so."""
    middle = float(np.float32((below + above) / 2))
    return middle if below < middle <= above else float(above)
