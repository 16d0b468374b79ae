"""The thresholds that answer best within a mean budget.

Leaving at an exit is a stopping problem: at a price per MAC, a sample should leave where what it is worth now exceeds
what it is worth, in the mean, to go on. With one threshold per exit this is solved exit by exit from the last to the
first, each exactly by a cumulative sum, until nothing changes. A ladder of such solutions, from the dearest price to
none, spans the frontier where it is convex; a budget between two rungs is met by moving all thresholds from one to the
other. Where the frontier is not convex, that is bettered by exchanges: one threshold moves, another pays for it.

Candidates are quantiles of the scores, not all scores: with few held-out samples finer ones gain nothing on others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dynanet.calibrate.budgeted import geometric, leaving, settled, thresholds_for_share

LEVELS = 32  # candidate thresholds per exit
PRICES = np.geomspace(100.0, 1e-3, 60)  # accuracy that all of the dearest path is worth
SWEEPS = 30  # of coordinate ascent; a handful suffices
STEPS = (1, -1, 2, -2, 4, -4, 8, -8)  # in levels, that a threshold moves in an exchange
ROUNDS = 6  # of exchanges
SLACK = 1e-9  # relative: sums of costs are rounded


class Rung(NamedTuple):
    """Thresholds (K - 1,), the mean cost they lead to and the mean value they reach."""

    thresholds: np.ndarray
    cost: float
    value: float


@dataclass(frozen=True, eq=False)
class ThresholdSearch:
    """What is known of N samples at K exits. Everything that follows from it is deterministic.

    Attributes:
        scores: (N, K - 1), samples leave where they are high.
        values: (N, K), what the answer of every exit is worth: 1 where it is correct.
        cost: (N, K), of leaving at every exit, rising from exit to exit.
    """

    scores: np.ndarray
    values: np.ndarray
    cost: np.ndarray

    def best_within(self, bound: float) -> np.ndarray:
        """Thresholds (K - 1,) of the highest value found whose mean cost does not exceed the bound.

        A little of the held-out value is luck. Where the bound exceeds what the best rung needs, it is spent all the
        same unless the value then falls by more than two standard errors: realised costs stay near the asked ones,
        and later exits are rarely worse.

        Args:
            bound: not below the cheapest path.
        """
        fits = [rung for rung in self.ladder if rung.cost <= bound * (1 + SLACK)]
        assert fits, "the bound is below the cheapest path; callers check"
        best = fits[-1]
        above = next((rung for rung in self.ladder if rung.cost > best.cost), None)
        if above is not None:
            between = [self._towards(best.thresholds, above.thresholds, bound), self._geometric_within(bound)]
            best = max((self.rung(thresholds) for thresholds in between), key=lambda r: r.value)
            best = self._exchanged(best, bound, self._line(fits[-1], above, bound))
        thrifty = max(fits, key=lambda r: r.value)
        if thrifty.value > best.value:
            lost = self._reached(thrifty.thresholds) - self._reached(best.thresholds)
            if lost.mean() > 2 * lost.std() / np.sqrt(len(lost)):
                best = thrifty
        return settled(self.scores, best.thresholds)

    @cached_property
    def ladder(self) -> list[Rung]:
        """From the cheapest to the dearest, each the best that was found for its price.

        Costs rise from rung to rung, and so do values, but for the last: nobody leaves early, whatever that is worth.
        """
        last = self.scores.shape[1]
        inner = [levels[1:-1] for levels in self._levels]
        bins = np.stack([np.searchsorted(inner[k], self.scores[:, k], side="right") for k in range(last)], 1)
        off = [len(levels) - 1 for levels in self._levels]
        starts = [[0] * last, off, [cut // 2 for cut in off]]
        for ratio in (0.5, 1.0, 2.0):
            thresholds = thresholds_for_share(self.scores, geometric(last + 1, ratio))
            starts.append([int(np.searchsorted(self._levels[k], thresholds[k])) for k in range(last)])
        found = [starts[0], off]
        unit = max(self.cost.mean(0).max(), np.finfo(float).tiny)
        for price in PRICES:
            worth = self.values - price / unit * self.cost
            solved = [_ascend(bins, worth, start, off) for start in starts]
            totals = [worth[self._rows, leaving(bins, np.array(cuts))].sum() for cuts in solved]
            starts[0] = solved[int(np.argmax(totals))]  # the next price starts from the best answer to this one
            found.append(starts[0])
        cuts = dict.fromkeys(tuple(each) for each in found)
        return _undominated([self.rung(np.array([self._levels[k][c] for k, c in enumerate(each)])) for each in cuts])

    def rung(self, thresholds: np.ndarray) -> Rung:
        """What thresholds cost and reach."""
        at = self._rows, leaving(self.scores, thresholds)
        return Rung(thresholds, float(self.cost[at].mean()), float(self.values[at].mean()))

    def _reached(self, thresholds: np.ndarray) -> np.ndarray:
        return self.values[self._rows, leaving(self.scores, thresholds)]

    def _fits(self, thresholds: np.ndarray, bound: float) -> bool:
        return bool(self.cost[self._rows, leaving(self.scores, thresholds)].mean() <= bound * (1 + SLACK))

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.arange(len(self.scores))

    @cached_property
    def _levels(self) -> list[np.ndarray]:
        """By exit, the candidate thresholds: -inf, quantiles, +inf."""
        inner = np.quantile(self.scores, np.linspace(0, 1, LEVELS + 1)[1:-1], axis=0, method="lower")
        return [np.concatenate([[-np.inf], np.unique(column), [np.inf]]) for column in inner.T]

    @cached_property
    def _surest_first(self) -> np.ndarray:
        return np.argsort(-self.scores, axis=0, kind="stable")

    def _line(self, low: Rung, high: Rung, bound: float) -> float:
        """The value of drawing lots between two rungs: near the best there is, as no point lies above the hull."""
        return low.value + (high.value - low.value) * (bound - low.cost) / (high.cost - low.cost)

    def _towards(self, low: np.ndarray, high: np.ndarray, bound: float) -> np.ndarray:
        """The point on the way from low to high thresholds, in ranks, that spends most within the bound."""
        n, ordered = len(self.scores), np.sort(self.scores, 0)
        start, end = (np.array([np.searchsorted(ordered[:, k], t[k]) for k in range(len(t))]) for t in (low, high))

        def at(way: float) -> np.ndarray:
            ranks = np.round(start + way * (end - start)).astype(int)
            return np.array([np.inf if r == n else -np.inf if r == 0 else ordered[r, k] for k, r in enumerate(ranks)])

        below, above, best = 0.0, 1.0, low
        for _ in range(int(np.log2(n)) + 4):
            middle = (below + above) / 2
            if self._fits(thresholds := at(middle), bound):
                below, best = middle, thresholds
            else:
                above = middle
        return best

    def _geometric_within(self, bound: float) -> np.ndarray:
        """The paper's thresholds for the bound: the ratio at which the geometric shares just fit."""
        best, early, late = np.full(self.scores.shape[1], -np.inf), -8.0, 8.0
        for _ in range(20):
            middle = (early + late) / 2
            thresholds = thresholds_for_share(self.scores, geometric(self.scores.shape[1] + 1, np.exp(middle)))
            if self._fits(thresholds, bound):
                early, best = middle, thresholds
            else:
                late = middle
        return best

    def _exchanged(self, best: Rung, bound: float, hoped: float) -> Rung:
        """Better thresholds by exchanges, until the hoped value is as near as its noise or nothing betters them."""
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
                    if paid is not None and (rung := self.rung(paid)).value > best.value:
                        best = rung
            if best is before:
                break
        return best

    def _paid(self, thresholds: np.ndarray, k: int, bound: float) -> np.ndarray | None:
        """The same but for exit k, where just so many leave that the bound is kept; None if it cannot be."""
        paid = thresholds.copy()
        paid[k] = np.inf
        onwards = self.cost[self._rows, leaving(self.scores, paid)]
        arrives = (self.scores[:, :k] < thresholds[:k]).all(1)
        order = self._surest_first[:, k]
        saved = np.where(arrives, onwards - self.cost[:, k], 0.0)[order].cumsum()
        excess = onwards.sum() - bound * len(onwards)
        if excess > 0:
            if saved[-1] < excess:
                return None
            paid[k] = self.scores[order[np.argmax(saved >= excess)], k]
        return paid if self._fits(paid, bound) else None


def _ascend(bins: np.ndarray, worth: np.ndarray, cuts: Sequence[int], off: Sequence[int]) -> list[int]:
    """Cuts (a sample leaves where bin >= cut) that no change of a single one betters."""
    cuts, last = list(cuts), bins.shape[1]
    for _ in range(SWEEPS):
        before = list(cuts)
        arrives = np.ones((last, len(bins)), bool)
        for k in range(1, last):
            arrives[k] = arrives[k - 1] & (bins[:, k - 1] < cuts[k - 1])
        onwards = worth[:, last]
        for k in range(last - 1, -1, -1):
            gain = np.where(arrives[k], worth[:, k] - onwards, 0.0)
            by_bin = np.bincount(bins[:, k], weights=gain, minlength=off[k])
            total = np.append(by_bin[::-1].cumsum()[::-1], 0.0)  # total[c]: what is gained if bins >= c leave
            best = total.max()
            if best > total[cuts[k]] + 1e-9:
                cuts[k] = int(np.flatnonzero(total >= best - 1e-12)[-1])
            onwards = np.where(bins[:, k] >= cuts[k], worth[:, k], onwards)
        if cuts == before:
            break
    return cuts


def _undominated(found: list[Rung]) -> list[Rung]:
    """By rising cost, those that are worth more than every cheaper one; and the dearest."""
    rungs: list[Rung] = []
    ordered = sorted(found, key=lambda r: (r.cost, -r.value))
    for each in ordered:
        if not rungs or (each.cost > rungs[-1].cost and each.value > rungs[-1].value):
            rungs.append(each)
    if ordered[-1].cost > rungs[-1].cost:
        rungs.append(ordered[-1])
    return rungs
