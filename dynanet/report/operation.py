"""An Operation is a choice at work on test samples: what it spends, what it answers, who leaves where."""

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
class Operation:
    """A choice, and what it does on the test samples.

    Attributes:
        name: the budget in words.
        choice: thresholds, and what they do on the held-out samples.
        outcome: on the test samples.
        ms: per sample, measured as a whole or else summed from the times of the exits; None: neither.
        low: of the 95 % interval of the accuracy (Wilson), as if samples were independent.
        high: of the same.
        change: accuracy minus that of the full model.
        change_margin: half of its 95 % interval, from the samples on which the two differ.
        class_mean: the mean of the accuracies of the classes.
        kappa: Cohen's.
        random: accuracy if as many samples left at every exit, but drawn by lot.
        lost: share of the samples that are answered wrong here and right by the full model.
        exits: (N,) where every sample leaves, from 0.
    """

    name: str
    choice: OperatingPoint
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
        """A risk was asked for."""
        return self.choice.budget.risk is not None


@dataclass(frozen=True)
class ExitShare:
    """An exit, and the samples that leave there.

    Attributes:
        macs: per sample, everything before the exit included.
        share: of the samples that leave here.
        right: of these; None: nobody leaves.
        full: what the full model answers right of these.
        alone: what the exit answers right of all samples.
    """

    macs: float
    share: float
    right: float | None
    full: float | None
    alone: float


@dataclass(frozen=True, eq=False)
class ClassShare:
    """A class: its samples, their mean share of the full MACs, accuracies here and of the full model, share (K,)."""

    name: str
    samples: int
    spent: float
    right: float
    full: float
    share: np.ndarray


def operate(test: ExitTable, choice: OperatingPoint, ms: float | None) -> Operation:
    """Apply a choice to the test samples.

    Args:
        test: with labels.
        choice: made on other samples.
        ms: per sample, measured; None: not.
    """
    labels = test.labels
    assert labels is not None, "callers check"
    exits, rows = leaving(test.scores, choice.thresholds), np.arange(test.samples)
    done = outcome(test, choice.thresholds)
    answers, change = test.answers[rows, exits], test.correct[rows, exits].astype(float) - test.correct[:, -1]
    low, high = wilson(done.accuracy, test.samples)
    return Operation(
        name=budget_name(choice.budget, float(test.mean_macs[-1])),
        choice=choice,
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
    """By exit, who leaves there if the samples leave at `exits` (N,)."""
    found = []
    for k in range(test.exits):
        here = exits == k
        right = float(test.correct[here, k].mean()) if here.any() else None
        full = float(test.correct[here, -1].mean()) if here.any() else None
        found.append(ExitShare(float(test.mean_macs[k]), float(here.mean()), right, full, float(test.accuracy[k])))
    return tuple(found)


def class_shares(test: ExitTable, exits: np.ndarray, names: Sequence[str]) -> tuple[ClassShare, ...]:
    """By class, the dearest first, where its samples leave."""
    labels, rows = test.labels, np.arange(test.samples)
    assert labels is not None, "callers check"
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
