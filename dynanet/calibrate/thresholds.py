"""Search for the thresholds with the highest accuracy within a mean budget.

Early exit is a stopping problem: at a given price per MAC, a sample should leave where its value now exceeds the
expected value of continuing. With one threshold per exit this is solved by coordinate ascent from the last exit to the
first, each exactly by a cumulative sum, until nothing changes. The solutions for a range of prices span the convex part
of the frontier; a budget between two of them is met by moving all thresholds from one solution to the other. Where the
frontier is not convex, that is improved by pairwise exchange: one threshold moves, another makes up for the cost.

Candidate thresholds are quantiles of the scores: with few held-out samples, finer ones do not generalise better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dynanet.calibrate.budgeted import geometric, leaving, settled, thresholds_for_share

LEVELS = 32  # candidate thresholds per exit
PRICES = np.geomspace(100.0, 1e-3, 60)  # of the most expensive path, in units of accuracy
SWEEPS = 30  # of coordinate ascent; usually a few suffice
STEPS = (1, -1, 2, -2, 4, -4, 8, -8)  # in levels, that a threshold moves in an exchange
ROUNDS = 6  # of exchanges
SLACK = 1e-9  # relative: sums of costs are rounded


class Solution(NamedTuple):
    """Thresholds (K - 1,) with their mean cost and mean value."""

    thresholds: np.ndarray
    cost: float
    value: float


@dataclass(frozen=True, eq=False)
class ThresholdSearch:
    """A deterministic search on N samples at K exits.

    Attributes:
        scores: (N, K - 1), samples leave where they are high.
        values: (N, K), of the answer of every exit: 1 where it is correct.
        cost: (N, K), of leaving at every exit, rising from exit to exit.
    """

    scores: np.ndarray
    values: np.ndarray
    cost: np.ndarray

    def best_within(self, bound: float) -> np.ndarray:
        """Thresholds (K - 1,) of the highest value found whose mean cost does not exceed the bound.

        Where a cheaper solution has a higher held-out value than one that uses up the bound, the latter is returned
        unless the difference exceeds two standard errors: part of it is chance, later exits are rarely worse, and costs
        stay near the requested ones.

        Args:
            bound: not below the cheapest path.
        """
        fits = [each for each in self.hull if each.cost <= bound * (1 + SLACK)]
        assert fits, "the bound is below the cheapest path; callers check"
        best = fits[-1]
        above = next((each for each in self.hull if each.cost > best.cost), None)
        if above is not None:
            between = [self._towards(best.thresholds, above.thresholds, bound), self._geometric_within(bound)]
            best = max((self.evaluate(thresholds) for thresholds in between), key=lambda each: each.value)
            best = self._exchanged(best, bound, self._line(fits[-1], above, bound))
        cheaper = max(fits, key=lambda each: each.value)
        if cheaper.value > best.value:
            lost = self._values_at(cheaper.thresholds) - self._values_at(best.thresholds)
            if lost.mean() > 2 * lost.std() / np.sqrt(len(lost)):
                best = cheaper
        return settled(self.scores, best.thresholds)

    @cached_property
    def hull(self) -> list[Solution]:
        """The best solutions found for each price, from the cheapest to the most expensive.

        Costs and values rise from one to the next; only the last, without early exits, may have a lower value.
        """
        last = self.scores.shape[1]
        inner = [levels[1:-1] for levels in self._levels]
        bins = np.stack([np.searchsorted(inner[k], self.scores[:, k], side="right") for k in range(last)], 1)
        off = [len(levels) - 1 for levels in self._levels]
        starts = [[0] * last, off, [cut // 2 for cut in off]]
        for ratio in (0.5, 1.0, 2.0):
            thresholds = thresholds_for_share(self.scores, geometric(last + 1, ratio))
            starts.append([int(np.searchsorted(self._levels[k], thresholds[k])) for k in range(last)])
        found = [starts[0], off]  # all at the first exit, and no early exit
        unit = max(self.cost.mean(0).max(), np.finfo(float).tiny)
        for price in PRICES:
            worth = self.values - price / unit * self.cost
            solved = [_ascend(bins, worth, start, off) for start in starts]
            totals = [worth[self._rows, leaving(bins, np.array(cuts))].sum() for cuts in solved]
            starts[0] = solved[int(np.argmax(totals))]  # the next price starts from the best solution for this one
            found.append(starts[0])
        cuts = dict.fromkeys(tuple(each) for each in found)
        return _undominated([self.evaluate(np.array([self._levels[k][c] for k, c in enumerate(e)])) for e in cuts])

    def evaluate(self, thresholds: np.ndarray) -> Solution:
        """The mean cost and value of thresholds (K - 1,)."""
        at = self._rows, leaving(self.scores, thresholds)
        return Solution(thresholds, float(self.cost[at].mean()), float(self.values[at].mean()))

    def _values_at(self, thresholds: np.ndarray) -> np.ndarray:
        return self.values[self._rows, leaving(self.scores, thresholds)]

    def _fits(self, thresholds: np.ndarray, bound: float) -> bool:
        return bool(self.cost[self._rows, leaving(self.scores, thresholds)].mean() <= bound * (1 + SLACK))

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.arange(len(self.scores))

    @cached_property
    def _levels(self) -> list[np.ndarray]:
        """The candidate thresholds of every exit: -inf, quantiles, +inf."""
        inner = np.quantile(self.scores, np.linspace(0, 1, LEVELS + 1)[1:-1], axis=0, method="lower")
        return [np.concatenate([[-np.inf], np.unique(column), [np.inf]]) for column in inner.T]

    @cached_property
    def _highest_first(self) -> np.ndarray:
        """Rows by falling score, for every exit, (N, K - 1)."""
        return np.argsort(-self.scores, axis=0, kind="stable")

    def _line(self, low: Solution, high: Solution, bound: float) -> float:
        """The value of mixing two solutions at random to meet the bound, which is close to the optimum."""
        return low.value + (high.value - low.value) * (bound - low.cost) / (high.cost - low.cost)

    def _towards(self, low: np.ndarray, high: np.ndarray, bound: float) -> np.ndarray:
        """Interpolate in ranks from low to high thresholds, by bisection, to the highest cost within the bound."""
        n = len(self.scores)
        ordered = np.sort(self.scores, 0)
        ends = np.full((1, ordered.shape[1]), np.inf)
        by_rank = np.concatenate([-ends, ordered[1:], ends])  # of rank 0: -inf, of rank n: +inf
        start, end = (np.array([np.searchsorted(ordered[:, k], t[k]) for k in range(len(t))]) for t in (low, high))

        def at(way: float) -> np.ndarray:
            ranks = np.round(start + way * (end - start)).astype(int)
            return by_rank[ranks, np.arange(len(ranks))]

        return _bisected(at, lambda thresholds: self._fits(thresholds, bound), low, 0.0, 1.0, int(np.log2(n)) + 4)

    def _geometric_within(self, bound: float) -> np.ndarray:
        """MSDNet's thresholds for the bound: those of the largest ratio whose geometric shares fit."""
        exits = self.scores.shape[1] + 1

        def at(log_ratio: float) -> np.ndarray:
            return thresholds_for_share(self.scores, geometric(exits, np.exp(log_ratio)))

        cheapest = np.full(exits - 1, -np.inf)
        return _bisected(at, lambda thresholds: self._fits(thresholds, bound), cheapest, -8.0, 8.0, 20)

    def _exchanged(self, best: Solution, bound: float, hoped: float) -> Solution:
        """Improve thresholds by exchanges, until the value is within noise of the hoped one or stops rising."""
        noise = 0.25 * self.values.std() / np.sqrt(len(self.values))
        pairs = [(j, k) for j in range(len(best.thresholds)) for k in range(len(best.thresholds)) if j != k]
        for _ in range(ROUNDS):
            before = best
            for j, k in pairs:
                if best.value >= hoped - noise:
                    return best
                at = int(np.searchsorted(self._levels[j], best.thresholds[j]))
                for level in {min(max(at + step, 0), len(self._levels[j]) - 1): None for step in STEPS}:
                    moved = best.thresholds.copy()
                    moved[j] = self._levels[j][level]
                    paid = self._paid(moved, k, bound)
                    if paid is not None and (found := self.evaluate(paid)).value > best.value:
                        best = found
            if best is before:
                break
        return best

    def _paid(self, thresholds: np.ndarray, k: int, bound: float) -> np.ndarray | None:
        """The thresholds with that of exit k set to just meet the bound; None if no threshold there meets it."""
        paid = thresholds.copy()
        paid[k] = np.inf
        onwards = self.cost[self._rows, leaving(self.scores, paid)]
        arrives = (self.scores[:, :k] < thresholds[:k]).all(1)
        order = self._highest_first[:, k]
        saved = np.where(arrives, onwards - self.cost[:, k], 0.0)[order].cumsum()
        excess = onwards.sum() - bound * len(onwards)
        if excess > 0:
            if saved[-1] < excess:
                return None
            paid[k] = self.scores[order[np.argmax(saved >= excess)], k]
        return paid if self._fits(paid, bound) else None


def _bisected(
    at: Callable[[float], np.ndarray],
    fits: Callable[[np.ndarray], bool],
    best: np.ndarray,
    low: float,
    high: float,
    steps: int,
) -> np.ndarray:
    """The last thresholds `at` a place between low and high that fit, by bisection; `best` if none does."""
    for _ in range(steps):
        middle = (low + high) / 2
        thresholds = at(middle)
        if fits(thresholds):
            low, best = middle, thresholds
        else:
            high = middle
    return best


def _ascend(bins: np.ndarray, worth: np.ndarray, cuts: Sequence[int], off: Sequence[int]) -> list[int]:
    """Coordinate ascent to cuts that no single change improves; a sample leaves where bin >= cut."""
    cuts = list(cuts)
    last = bins.shape[1]
    for _ in range(SWEEPS):
        before = list(cuts)
        arrives = np.ones((last, len(bins)), bool)
        for k in range(1, last):
            arrives[k] = arrives[k - 1] & (bins[:, k - 1] < cuts[k - 1])
        onwards = worth[:, last]
        for k in range(last - 1, -1, -1):
            gain = np.where(arrives[k], worth[:, k] - onwards, 0.0)
            by_bin = np.bincount(bins[:, k], weights=gain, minlength=off[k])
            total = np.append(by_bin[::-1].cumsum()[::-1], 0.0)  # total[c]: the gain if bins >= c leave
            best = total.max()
            if best > total[cuts[k]] + 1e-9:
                cuts[k] = int(np.flatnonzero(total >= best - 1e-12)[-1])
            onwards = np.where(bins[:, k] >= cuts[k], worth[:, k], onwards)
        if cuts == before:
            break
    return cuts


def _undominated(found: list[Solution]) -> list[Solution]:
    """By rising cost, the solutions with a higher value than every cheaper one, and the most expensive."""
    kept: list[Solution] = []
    ordered = sorted(found, key=lambda each: (each.cost, -each.value))
    for each in ordered:
        if not kept or (each.cost > kept[-1].cost and each.value > kept[-1].value):
            kept.append(each)
    if ordered[-1].cost > kept[-1].cost:
        kept.append(ordered[-1])
    return kept
