"""Risk control: which thresholds have P(expected loss <= risk) >= confidence, over the draw of the held-out samples.

Learn-then-Test with fixed-sequence testing (Angelopoulos et al. 2021, arXiv:2110.01052): thresholds are ordered in
advance from the latest exits to the earliest, and tested in this order, each at the full level delta, until the first
that fails. The last *before* it is certified. (Public code certifies the one that failed; on a coarse grid that breaks
the promise in 4 to 5 draws of 10.) Two tests of "the expected loss exceeds the risk":

- losses that are 0 or 1: the exact binomial tail;
- other losses up to 1, negative ones included: the betting bound of Waudby-Smith and Ramdas (2020, arXiv:2010.09686),
  as used for risk-controlling prediction sets (Bates et al. 2021, arXiv:2101.02703) and for early exit (Jazbec et al.
  2024, arXiv:2405.20915).

The promise holds for the mean over samples from the distribution of the held-out ones, not for single samples.
"""

import math

import numpy as np

from dynanet.calibrate.table import ExitTable
from dynanet.core.errors import BudgetError, DataError

GRID = 101  # threshold vectors in the family
GRID_SHARE = 0.1  # of the held-out samples choose the family, and are not tested with


class UncertifiedWarning(UserWarning):
    """No early exit is certified at this risk, so the model never exits early."""


def lost_answers(table: ExitTable) -> np.ndarray:
    """(N, K) 0-1 losses: 1 where an exit is wrong and the last exit right, so that the last exit has none."""
    return (table.correct[:, -1:] & ~table.correct).astype(np.float64)


def common_levels(scores: np.ndarray) -> np.ndarray:
    """The family of thresholds to test: one level for all exits, from +inf (no early exit) to -inf (all at the first).

    Levels are evenly spaced quantiles of the scores of all exits together, from the highest to the lowest. Confidences
    of `gates.confidence` are comparable between exits, so one level costs each exit about the same risk. The samples
    given here must not be used for testing.

    Args:
        scores: (n, K - 1).

    Returns:
        (L, K - 1) thresholds, at most `GRID` rows, from the latest exits to the earliest.
    """
    if scores.shape[1] == 0:  # a single exit has no thresholds
        return np.zeros((1, 0))
    levels = np.unique(np.quantile(scores, np.linspace(0, 1, GRID - 2), method="higher"))[::-1]
    return np.repeat(np.concatenate([[np.inf], levels, [-np.inf]])[:, None], scores.shape[1], axis=1)


def certified(losses: np.ndarray, risk: float, delta: float) -> int:
    """How many threshold vectors of a sequence, from its start, are certified to keep the risk.

    With probability 1 - delta over the draw of the samples, the expected loss of none of these exceeds the risk. The
    last certified one has the index returned minus 1.

    Args:
        losses: (n, L) at most 1, of n independent samples, for L threshold vectors in an order fixed beforehand.
        risk: in (0, 1).
        delta: in (0, 1), the probability that the certificate fails.

    Raises:
        BudgetError: risk or delta outside (0, 1).
        DataError: losses above 1, or NaN.
    """
    if not (0 < risk < 1 and 0 < delta < 1):
        raise BudgetError(f"risk and delta must be between 0 and 1, got {risk!r} and {delta!r}")
    if not (np.isfinite(losses).all() and (losses <= 1).all()):
        raise DataError("losses must be finite and at most 1; rescale them")
    if len(losses) == 0:
        return 0
    passes = (binomial_passes if is_binary(losses) else betting_passes)(losses, risk, delta)
    return int(np.logical_and.accumulate(passes).sum())


def binomial_passes(losses: np.ndarray, risk: float, delta: float) -> np.ndarray:
    """Which columns of 0-1 losses (n, L) have an exact binomial p-value of at most delta, (L,) bool."""
    n = len(losses)
    return binomial_cdf(n, risk)[losses.sum(0).astype(int)] <= delta


def betting_passes(losses: np.ndarray, risk: float, delta: float) -> np.ndarray:
    """Which columns of losses reject "the expected loss is at least `risk`" by betting at level delta, (L,) bool.

    The capital of a bettor on lower losses is a non-negative supermartingale if the expected loss is at least `risk`,
    so that it reaches 1 / delta with probability at most delta (Ville's inequality). Bets depend on earlier samples
    only (predictable plug-in; Waudby-Smith and Ramdas, section 3). Only the upper bound of 1 matters, so losses may be
    negative.

    Args:
        losses: (n, L), at most 1.
        risk: in (0, 1).
        delta: in (0, 1).
    """
    n = len(losses)
    count = np.arange(1, n + 1)[:, None]
    mean = (0.5 + losses.cumsum(0)) / (1 + count)
    variance = (0.25 + ((losses - mean) ** 2).cumsum(0)) / (1 + count)
    earlier = np.concatenate([np.full((1, losses.shape[1]), 0.25), variance[:-1]])  # bets precede their sample
    bet = np.minimum(np.sqrt(2 * math.log(1 / delta) / (n * earlier)), 1.0)
    log_capital = np.log1p(-bet * (losses - risk)).cumsum(0)
    return log_capital.max(0) >= math.log(1 / delta)


def binomial_cdf(n: int, p: float) -> np.ndarray:
    """P(X <= k) for k = 0..n, X binomial (n, p): exact to about 1e-13.

    Weights are products of ratios from the mode outwards, so that they cannot overflow, and are normalised.
    """
    k = np.arange(n + 1)
    mode = min(int((n + 1) * p), n)
    up = (n - k[mode:-1]) / (k[mode:-1] + 1) * (p / (1 - p))
    down = k[mode:0:-1] / (n - k[mode:0:-1] + 1) * ((1 - p) / p)
    with np.errstate(under="ignore"):
        weights = np.concatenate([np.cumprod(down)[::-1], [1.0], np.cumprod(up)])
    below = weights.cumsum()
    return below / below[-1]


def is_binary(losses: np.ndarray) -> bool:
    """All losses are 0 or 1, so that their count is binomial."""
    return bool(np.isin(losses, (0, 1)).all())


def least_samples(risk: float, delta: float, *, binary: bool) -> int:
    """The fewest samples that certify a risk if all their losses are 0.

    For 0-1 losses, (1 - risk)^n <= delta. For the betting bound, which needs more, by bisection.
    """
    fewest = math.ceil(math.log(delta) / math.log1p(-risk) - 1e-9)
    if binary:
        return fewest

    def suffices(n: int) -> bool:
        return bool(betting_passes(np.zeros((n, 1)), risk, delta)[0])

    most = fewest
    while not suffices(most):
        fewest, most = most, 2 * most
    while fewest < most:
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if suffices(middle) else (middle + 1, most)
    return most
