"""Findings are what a report shows: where the compute went, and how far the answers can be trusted.

Everything here is computed from tables, by functions that neither run a model nor draw. "Full" is the model whose
samples all leave at the last exit: its accuracy, its MACs and, where measured, its time are what the rest is held
against.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dynanet.core.budget import Budget
from dynanet.core.errors import ConfigError, DataError
from dynanet.infer.anytime import anytime, at_random
from dynanet.infer.budgeted import Outcome, leaving, outcome
from dynanet.infer.choice import Choice
from dynanet.infer.risk import GRID_SHARE, lost_answers
from dynanet.infer.table import Table
from dynanet.inspect.samples import Sample, Samples, easiest, hardest, surest_mistakes, usual_spectra
from dynanet.inspect.scene import Scene, SceneShare, where_in_scene

NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Origin:
    """Where figures come from. What is left empty is shown as not given.

    Attributes:
        data: the data set and how it was split, seed included.
        test: what the figures are measured on: "test pixels of the field_cut split".
        held_out: what the thresholds were fitted on.
        held_out_samples: how many; None: not given.
        model: the architecture.
        device: processor or accelerator, threads.
        versions: by package.
        commit: of the code.
        date: of the measurement, with the time zone.
        more: other facts by name: the command, the load average, the seed.
    """

    data: str
    test: str
    held_out: str = ""
    held_out_samples: int | None = None
    model: str = ""
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = ""
    date: str = ""
    more: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """Another network to compare with: its mean MACs and ms per sample, its accuracy on the same samples."""

    name: str
    macs: float
    accuracy: float
    ms: float | None = None


@dataclass(frozen=True)
class Timing:
    """Measured milliseconds per sample.

    Attributes:
        how: masked, sparse or exported; engine, batch size, threads: "sparse session, ONNX Runtime, batch 64, 1 thread".
        full: of the full model, run the same way.
        choices: of every choice, in their order; None where not measured.
    """

    how: str
    full: float
    choices: Sequence[float | None]


@dataclass(frozen=True, eq=False)
class Operation:
    """A choice, and what it does on the test samples.

    Attributes:
        name: the budget in words.
        choice: thresholds, and what they do on the held-out samples.
        outcome: on the test samples.
        ms: per sample, measured; None: not.
        low, high: 95 % interval of the accuracy (Wilson), as if samples were independent.
        change: accuracy minus that of the full model.
        change_margin: half of its 95 % interval, from the samples on which the two differ.
        class_mean: the mean of the accuracies of the classes.
        kappa: Cohen's.
        random: accuracy if as many samples left at every exit, but drawn by lot.
        lost: share of the samples that are answered wrong here and right by the full model.
        exits: (N,) where every sample leaves.
    """

    name: str
    choice: Choice
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


@dataclass(frozen=True)
class ExitShare:
    """An exit at the explained budget: its MACs, the share of samples that leave there, and how these are answered.

    `right` is None where nobody leaves; `full` is the full model's accuracy on the same samples, `alone` the exit's on
    all samples.
    """

    macs: float
    share: float
    right: float | None
    full: float | None
    alone: float


@dataclass(frozen=True, eq=False)
class ClassShare:
    """A class at the explained budget: samples, mean share of the full MACs, accuracies, share (K,) at every exit."""

    name: str
    samples: int
    spent: float
    right: float
    full: float
    share: np.ndarray


@dataclass(frozen=True)
class Promise:
    """A risk that was asked for. `tested` samples were tested, others chose the thresholds; None: not given."""

    operation: Operation
    risk: float
    confidence: float
    kept: bool
    tested: int | None


@dataclass(frozen=True, eq=False)
class Findings:
    """What a report shows.

    Attributes:
        title: of the report.
        origin: where the figures come from.
        class_names: by index.
        samples: number of test samples.
        full: all samples at the last exit.
        full_low, full_high: 95 % interval of its accuracy.
        full_class_mean, full_kappa: as in `Operation`.
        unbalanced: classes differ so much in size that the mean of the classes says something of its own.
        operations: one per choice.
        explained: which of them is looked at in detail.
        line: outcomes along the frontier, on the test samples.
        random: the same shares drawn by lot.
        alone: every exit alone.
        static: other networks.
        timing: measured; None: not.
        exits, classes: of the explained operation; classes by falling cost.
        absent: names of the classes without a test sample.
        easy, hard, mistakes: samples; see `samples`.
        shown: what can be shown of samples; None: nothing.
        usual_spectra: (C, bands), the mean of every class over the test samples, NaN where it has none; None: no spectra.
        promises: of the choices with a risk.
        scene: maps; None: no scene.
        scene_shares: where in the scene the compute went.
    """

    title: str
    origin: Origin
    class_names: tuple[str, ...]
    samples: int
    full: Outcome
    full_low: float
    full_high: float
    full_class_mean: float
    full_kappa: float
    unbalanced: bool
    operations: tuple[Operation, ...]
    explained: int
    line: tuple[Outcome, ...]
    random: tuple[Outcome, ...]
    alone: tuple[Outcome, ...]
    static: tuple[Point, ...]
    timing: Timing | None
    exits: tuple[ExitShare, ...]
    classes: tuple[ClassShare, ...]
    absent: tuple[str, ...]
    easy: tuple[Sample, ...]
    hard: tuple[Sample, ...]
    mistakes: tuple[Sample, ...]
    shown: Samples | None
    usual_spectra: np.ndarray | None
    promises: tuple[Promise, ...]
    scene: Scene | None
    scene_shares: tuple[SceneShare, ...]


def find(
    test: Table,
    choices: Sequence[Choice],
    origin: Origin,
    class_names: Sequence[str],
    *,
    title: str = "Where the compute went",
    line: Sequence[Choice] = (),
    static: Sequence[Point] = (),
    timing: Timing | None = None,
    shown: Samples | None = None,
    scene: Scene | None = None,
    explain: int | None = None,
) -> Findings:
    """Everything that a report shows, from the table of test samples.

    Args:
        test: with labels; `infer.tabulate` over the test loader makes one. The thresholds must come from other samples.
        choices: the budgets, chosen on held-out data: `frontier.choose(budget)`. Those with a risk were chosen with the
            losses that `choose` takes by itself.
        origin: where the figures come from.
        class_names: by index.
        title: of the report.
        line: choices along the frontier, `frontier.curve()`, for the line of accuracy against cost.
        static: other networks, measured on the same samples.
        timing: measured speed of the choices; without it the speeds follow from the table's `ms`, if it has them.
        shown: what can be shown of the test samples, in the table's order.
        scene: the maps of an image, at the explained choice.
        explain: which choice is looked at in detail; None: the one without a risk that spends nearest to half.

    Raises:
        DataError: a table without labels, labels without a name, figures whose number does not fit.
        ConfigError: no choices, or `explain` is none of them.
    """
    _check(test, choices, class_names, timing)
    labels = test.labels
    assert labels is not None, "checked"
    operations = tuple(
        _operation(test, choice, None if timing is None else timing.choices[i]) for i, choice in enumerate(choices)
    )
    if explain is None:
        half = test.mean_macs[-1] / 2
        explain = min(
            range(len(choices)),
            key=lambda i: (choices[i].asked.risk is not None, abs(operations[i].outcome.macs - half)),
        )
    elif not 0 <= explain < len(choices):
        raise ConfigError(f"explain={explain}, but there are {len(choices)} choices; give an index from 0")
    if shown is not None:
        shown.check(test.samples, scene)
    if scene is not None:
        scene.check(len(class_names))
    exits = operations[explain].exits
    counts = np.bincount(labels, minlength=len(class_names))
    full = at_random(test, np.eye(test.exits)[-1])
    points = tuple(outcome(test, choice.thresholds) for choice in line)
    low, high = wilson(full.accuracy, test.samples)
    return Findings(
        title=title,
        origin=origin,
        class_names=tuple(class_names),
        samples=test.samples,
        full=full,
        full_low=low,
        full_high=high,
        full_class_mean=class_mean(labels, test.answers[:, -1]),
        full_kappa=kappa(labels, test.answers[:, -1]),
        unbalanced=bool(counts.max() > 1.5 * counts[counts > 0].min()),
        operations=operations,
        explained=explain,
        line=points,
        random=tuple(at_random(test, point.share) for point in points),
        alone=tuple(anytime(test)),
        static=tuple(static),
        timing=timing,
        exits=_exits(test, exits),
        classes=_classes(test, labels, exits, class_names),
        absent=tuple(name for name, count in zip(class_names, counts, strict=True) if not count),
        easy=easiest(test, exits),
        hard=hardest(test, exits),
        mistakes=surest_mistakes(test, exits),
        shown=shown,
        usual_spectra=None if shown is None else usual_spectra(shown, labels, len(class_names)),
        promises=tuple(_promise(each, origin.held_out_samples) for each in operations if each.choice.asked.risk),
        scene=scene,
        scene_shares=() if scene is None else where_in_scene(scene),
    )


def budget_name(budget: Budget, full_macs: float) -> str:
    """A budget in words.

    >>> budget_name(Budget(macs=5e5), full_macs=2e6)
    '25 % of the MACs'
    """
    words = []
    if budget.macs is not None:
        words.append(f"{_percent(budget.macs / full_macs)} of the MACs")
    if budget.ms is not None:
        words.append(f"{budget.ms:.3g} ms")
    if budget.risk is not None:
        words.append(f"risk at most {_percent(budget.risk)}")
    if budget.cap_macs is not None:
        words.append(f"no sample above {_percent(budget.cap_macs / full_macs)} of the MACs")
    return ", ".join(words)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n independent samples (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    z = NORMAL_95**2 / n
    middle, half = (share + z / 2) / (1 + z), math.sqrt(share * (1 - share) * z + z * z / 4) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def class_mean(labels: np.ndarray, answers: np.ndarray) -> float:
    """The mean over the classes present of their accuracy ("average accuracy" in remote sensing)."""
    return float(np.mean([(answers[labels == c] == c).mean() for c in np.unique(labels)]))


def kappa(labels: np.ndarray, answers: np.ndarray) -> float:
    """Cohen's kappa: agreement beyond that of answers which know the classes' shares only; NaN for a single class."""
    classes = max(labels.max(), answers.max()) + 1
    truth, said = (np.bincount(each, minlength=classes) / len(labels) for each in (labels, answers))
    chance = float(truth @ said)
    return float("nan") if chance == 1 else (float((labels == answers).mean()) - chance) / (1 - chance)


def _operation(test: Table, choice: Choice, ms: float | None) -> Operation:
    labels = test.labels
    assert labels is not None, "checked"
    exits, rows = leaving(test.scores, choice.thresholds), np.arange(test.samples)
    done = outcome(test, choice.thresholds)
    right, full = test.correct[rows, exits], test.correct[:, -1]
    change = right.astype(float) - full
    low, high = wilson(done.accuracy, test.samples)
    return Operation(
        name=budget_name(choice.asked, float(test.mean_macs[-1])),
        choice=choice,
        outcome=done,
        ms=ms,
        low=low,
        high=high,
        change=float(change.mean()),
        change_margin=float(NORMAL_95 * change.std() / math.sqrt(test.samples)),
        class_mean=class_mean(labels, test.answers[rows, exits]),
        kappa=kappa(labels, test.answers[rows, exits]),
        random=at_random(test, done.share).accuracy,
        lost=float(lost_answers(test)[rows, exits].mean()),
        exits=exits,
    )


def _exits(test: Table, exits: np.ndarray) -> tuple[ExitShare, ...]:
    found = []
    for k in range(test.exits):
        here = exits == k
        right = float(test.correct[here, k].mean()) if here.any() else None
        full = float(test.correct[here, -1].mean()) if here.any() else None
        found.append(ExitShare(float(test.mean_macs[k]), float(here.mean()), right, full, float(test.accuracy[k])))
    return tuple(found)


def _classes(test: Table, labels: np.ndarray, exits: np.ndarray, names: Sequence[str]) -> tuple[ClassShare, ...]:
    rows = np.arange(test.samples)
    right = test.correct[rows, exits]
    spent = np.broadcast_to(test.macs, test.correct.shape)[rows, exits] / test.mean_macs[-1]
    found = []
    for c in np.unique(labels):
        here = labels == c
        share = np.bincount(exits[here], minlength=test.exits) / here.sum()
        full = float(test.correct[here, -1].mean())
        shares = ClassShare(
            names[c], int(here.sum()), float(spent[here].mean()), float(right[here].mean()), full, share
        )
        found.append(shares)
    return tuple(sorted(found, key=lambda each: -each.spent))


def _promise(operation: Operation, held_out: int | None) -> Promise:
    asked = operation.choice.asked
    assert asked.risk is not None, "callers check"
    tested = None if held_out is None else held_out - math.ceil(GRID_SHARE * held_out)
    return Promise(operation, asked.risk, asked.confidence, bool(operation.choice.promised), tested)


def _check(test: Table, choices: Sequence[Choice], names: Sequence[str], timing: Timing | None) -> None:
    if not choices:
        raise ConfigError("a report needs at least one choice; give frontier.choose(budget)")
    if test.labels is None:
        raise DataError("a report needs the labels of the test samples; make the table with infer.tabulate")
    most = max(int(test.labels.max()), int(test.answers.max()))
    if most >= len(names) or test.labels.min() < 0:
        raise DataError(
            f"labels from {test.labels.min()}, classes up to {most}, but {len(names)} class names from 0 on"
        )
    if timing is not None and len(timing.choices) != len(choices):
        raise DataError(
            f"{len(timing.choices)} times for {len(choices)} choices; give one for each, None if unmeasured"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
