"""Operating points evaluated on test samples: cost, accuracy and exit rates, by exit and by class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynanet.calibrate.anytime import random_exits
from dynanet.calibrate.budgeted import Outcome, leaving, outcome
from dynanet.calibrate.operating_point import OperatingPoint
from dynanet.calibrate.risk import lost_answers
from dynanet.calibrate.table import ExitTable
from dynanet.core.budget import Budget
from dynanet.report.statistics import class_mean, kappa, mean_margin, wilson
from dynanet.report.words import short_percent


@dataclass(frozen=True, eq=False)
class Evaluation:
    """An operating point on the test samples.

    Attributes:
        name: the budget in words.
        point: as chosen on the held-out samples.
        outcome: on the test samples.
        ms: per sample, measured as a whole or else summed from the times of the exits; None: neither.
        low: of the 95 % interval of the accuracy (Wilson), as if samples were independent.
        high: of the same.
        change: accuracy minus that of the full model.
        change_margin: half of its 95 % interval, from the samples on which the two differ.
        class_mean: the mean of the accuracies of the classes.
        kappa: Cohen's kappa.
        random: accuracy of random exits with the same shares.
        lost: share of the samples that are wrong here and correct at the last exit.
        exits: (N,) where every sample leaves, from 0.
    """

    name: str
    point: OperatingPoint
    outcome: Outcome
    ms: float | None
    low: float
    high: float
    change: float
    change_margin: float
    class_mean: float
    kappa: float
    random: float
    lost: float
    exits: np.ndarray

    @property
    def risky(self) -> bool:
        """Whether the budget has a risk."""
        return self.point.budget.risk is not None


@dataclass(frozen=True)
class ExitShare:
    """An exit, and the samples that leave there.

    Attributes:
        macs: per sample, everything before the exit included.
        share: of the samples that leave here.
        right: accuracy on these; None: no sample leaves.
        full: accuracy of the full model on these; None: no sample leaves.
        alone: accuracy on all samples.
    """

    macs: float
    share: float
    right: float | None
    full: float | None
    alone: float


@dataclass(frozen=True, eq=False)
class ClassShare:
    """A class at an operating point.

    Attributes:
        name: of the class.
        samples: of this class.
        spent: mean share of the full MACs.
        right: accuracy.
        full: accuracy of the full model.
        share: (K,) of its samples that leave at every exit.
    """

    name: str
    samples: int
    spent: float
    right: float
    full: float
    share: np.ndarray


def evaluate(test: ExitTable, point: OperatingPoint, ms: float | None) -> Evaluation:
    """Apply an operating point to the test samples.

    Args:
        test: with labels.
        point: chosen on other samples.
        ms: measured, per sample; None: not measured.
    """
    labels = test.labels
    assert labels is not None, "callers check"
    exits = leaving(test.scores, point.thresholds)
    rows = np.arange(test.samples)
    done = outcome(test, point.thresholds)
    answers = test.answers[rows, exits]
    change = test.correct[rows, exits].astype(float) - test.correct[:, -1]
    low, high = wilson(done.accuracy, test.samples)
    return Evaluation(
        name=budget_name(point.budget, float(test.mean_macs[-1])),
        point=point,
        outcome=done,
        ms=done.ms if ms is None else ms,
        low=low,
        high=high,
        change=float(change.mean()),
        change_margin=mean_margin(change),
        class_mean=class_mean(labels, answers),
        kappa=kappa(labels, answers),
        random=random_exits(test, done.share).accuracy,
        lost=float(lost_answers(test)[rows, exits].mean()),
        exits=exits,
    )


def exit_shares(test: ExitTable, exits: np.ndarray) -> tuple[ExitShare, ...]:
    """Cost, share and accuracies of every exit, if the samples leave at `exits` (N,)."""
    found = []
    for k in range(test.exits):
        here = exits == k
        right = float(test.correct[here, k].mean()) if here.any() else None
        full = float(test.correct[here, -1].mean()) if here.any() else None
        found.append(ExitShare(float(test.mean_macs[k]), float(here.mean()), right, full, float(test.accuracy[k])))
    return tuple(found)


def class_shares(test: ExitTable, exits: np.ndarray, names: Sequence[str]) -> tuple[ClassShare, ...]:
    """Cost, accuracies and shares of every class, most expensive first, if the samples leave at `exits` (N,)."""
    labels = test.labels
    assert labels is not None, "callers check"
    rows = np.arange(test.samples)
    right = test.correct[rows, exits]
    spent = np.broadcast_to(test.macs, test.correct.shape)[rows, exits] / test.mean_macs[-1]
    found = []
    for c in np.unique(labels):
        here = labels == c
        found.append(
            ClassShare(
                name=names[c],
                samples=int(here.sum()),
                spent=float(spent[here].mean()),
                right=float(right[here].mean()),
                full=float(test.correct[here, -1].mean()),
                share=np.bincount(exits[here], minlength=test.exits) / here.sum(),
            )
        )
    return tuple(sorted(found, key=lambda each: -each.spent))


def budget_name(budget: Budget, full_macs: float) -> str:
    """A budget in words.

    >>> budget_name(Budget(macs=5e5), full_macs=2e6)
    '25 % of the MACs'
    """
    words = []
    if budget.macs is not None:
        words.append(f"{short_percent(budget.macs / full_macs)} of the MACs")
    if budget.ms is not None:
        words.append(f"{budget.ms:.3g} ms")
    if budget.risk is not None:
        words.append(f"risk at most {short_percent(budget.risk)}")
    if budget.cap_macs is not None:
        words.append(f"no sample above {short_percent(budget.cap_macs / full_macs)} of the MACs")
    return ", ".join(words)
