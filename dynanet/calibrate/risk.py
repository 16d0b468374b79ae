"""Which thresholds can be promised: P(expected loss <= risk) >= confidence, over the draw of the held-out samples.

Learn-then-Test with fixed-sequence testing (Angelopoulos et al. 2021, arXiv:2110.01052): thresholds are ordered in
advance from the most careful to the most eager, and tested in this order, each at the full level delta, until the
first that fails. The last *before* it is promised. (Code in circulation promises the one that failed; on a coarse grid
it breaks the promise in 4 to 5 draws of 10.) Two tests of "the expected loss exceeds the risk":

- losses that are 0 or 1: the exact binomial tail;
- other losses up to 1, negative ones included: the betting bound of Waudby-Smith and Ramdas (2020, arXiv:2010.09686),
  as used for risk-controlling prediction sets (Bates et al. 2021, arXiv:2101.02703) and for early exit (Jazbec et al.
  2024, arXiv:2405.20915).

The promise is about samples like the held-out ones, and about their mean. "Validation accuracy was fine" is no promise.
"""

import math

import numpy as np

from dynanet.calibrate.table import ExitTable
from dynanet.core.errors import BudgetError, DataError

GRID = 101  # threshold vectors in the family
GRID_SHARE = 0.1  # of the held-out samples choose the family, and are not tested with


class UncertifiedWarning(UserWarning):
    """No early exit can be promised at this risk: the model never exits early."""


def lost_answers(table: ExitTable) -> np.ndarray:
    """(N, K) 0-1 losses: wrong where the whole model is right. The last exit loses nothing."""
    return (table.correct[:, -1:] & ~table.correct).astype(np.float64)


def errors(table: ExitTable) -> np.ndarray:
    """(N, K) 0-1 losses: wrong. The whole model errs too, so that a small risk may be out of reach."""
    return (~table.correct).astype(np.float64)


def accuracy_gap(table: ExitTable) -> np.ndarray:
    """(N, K) losses in {-1, 0, 1}, in the mean the accuracy lost against the whole model. Early may be better."""
    return table.correct[:, -1:].astype(np.float64) - table.correct


def common_levels(scores: np.ndarray) -> np.ndarray:
    """The family that is tested: one level of confidence for all exits, from +inf (never) to -inf (all leave at once).

    The rule is fixed in advance: levels are the quantiles of the scores of all exits together, evenly spaced from the
    highest to the lowest. Confidences of `gates.confidence` mean the same at every exit, so one level costs each exit
    about the same risk. The samples given here must not be tested with afterwards.

    Args:
        scores: (n, K - 1).

    Returns:
        (L, K - 1) thresholds, at most `GRID`, from the most careful to the most eager.
    """
    if scores.shape[1] == 0:  # one exit, one way
        return np.zeros((1, 0))
    levels = np.unique(np.quantile(scores, np.linspace(0, 1, GRID - 2), method="higher"))[::-1]
    return np.repeat(np.concatenate([[np.inf], levels, [-np.inf]])[:, None], scores.shape[1], axis=1)


def certified(losses: np.ndarray, risk: float, delta: float) -> int:
    """How many of a sequence, from its start, are promised to have an expected loss of at most `risk`; 0: none.

    With probability 1 - delta over the draw of the samples, none of these exceeds the risk. So the last that may be
    used is number certified - 1.

    Args:
        losses: (n, L) at most 1, of n independent samples, for L threshold vectors in an order fixed beforehand.
        risk: in (0, 1).
        delta: in (0, 1), the probability with which the promise may fail.

    Raises:
        BudgetError: risk or delta outside (0, 1).
        DataError: losses above 1, or NaN.
    """
    if not (0 < risk < 1 and 0 < delta < 1):
        raise BudgetError(f"risk={risk!r} and delta={delta!r} must lie between 0 and 1")
    if not (np.isfinite(losses).all() and (losses <= 1).all()):
        raise DataError("losses must be finite and at most 1; scale them")
    if len(losses) == 0:
        return 0
    passes = (binomial_passes if is_binary(losses) else betting_passes)(losses, risk, delta)
    return int(np.logical_and.accumulate(passes).sum())


def binomial_passes(losses: np.ndarray, risk: float, delta: float) -> np.ndarray:
    """(L,) bool: the exact binomial p-value of every column of 0-1 losses (n, L) is at most delta."""
    n = len(losses)
    return binomial_cdf(n, risk)[losses.sum(0).astype(int)] <= delta


def betting_passes(losses: np.ndarray, risk: float, delta: float) -> np.ndarray:
    """(L,) bool: a gambler who bets that the expected loss is below `risk` multiplies his money by 1 / delta.

    If it were not below, his money would be a non-negative supermartingale, and the chance of that at most delta
    (Ville). Bets depend on earlier samples only (predictable plug-in; Waudby-Smith and Ramdas, section 3). Only the
    upper bound 1 of the losses matters, so negative ones may be given.

    Args:
        losses: (n, L), at most 1.
        risk: in (0, 1).
        delta: in (0, 1).
    """
    n = len(losses)
    count = np.arange(1, n + 1)[:, None]
    mean = (0.5 + losses.cumsum(0)) / (1 + count)
    variance = (0.25 + ((losses - mean) ** 2).cumsum(0)) / (1 + count)
    before = np.concatenate([np.full((1, losses.shape[1]), 0.25), variance[:-1]])
    bet = np.minimum(np.sqrt(2 * math.log(1 / delta) / (n * before)), 1.0)
    money = np.log1p(-bet * (losses - risk)).cumsum(0)
    return money.max(0) >= math.log(1 / delta)


def binomial_cdf(n: int, p: float) -> np.ndarray:
    """P(X <= k) for k = 0..n, X binomial (n, p): exact to about 1e-13.

    The weights grow and fall by known ratios from the mode, where nothing over- or underflows, and are normalised.
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
    """The fewest samples with which losses of zero throughout are proof.

    For 0-1 losses, (1 - risk)^n <= delta. The betting bound needs more; its number is searched.
    """
    fewest = math.ceil(math.log(delta) / math.log1p(-risk) - 1e-9)
    if binary:
        return fewest

    def proves(n: int) -> bool:
        return bool(betting_passes(np.zeros((n, 1)), risk, delta)[0])

    most = fewest
    while not proves(most):
        fewest, most = most, 2 * most
    while fewest < most:
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if proves(middle) else (middle + 1, most)
    return most
