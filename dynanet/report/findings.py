"""Findings are what a report shows: where the compute went, and how far the answers can be trusted.

Everything here is computed from tables, by functions that neither run a model nor draw. "Full" is the model whose
samples all leave at the last exit: its accuracy, its MACs and, where measured, its time are what the rest is held
against.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dynanet.calibrate.anytime import anytime_curve, random_exits
from dynanet.calibrate.budgeted import Outcome, outcome
from dynanet.calibrate.operating_point import OperatingPoint
from dynanet.calibrate.risk import GRID_SHARE
from dynanet.calibrate.table import ExitTable
from dynanet.core.errors import ConfigError, DataError
from dynanet.report.operation import ClassShare, ExitShare, Operation, class_shares, exit_shares, operate
from dynanet.report.samples import Sample, Samples, easiest, hardest, surest_mistakes, usual_spectra
from dynanet.report.scene import SceneMaps, SceneShare, where_in_scene
from dynanet.report.statistics import class_mean, kappa, wilson


@dataclass(frozen=True)
class Origin:
    """Where figures come from. What is left empty is shown as not given.

    Attributes:
        data: the data set and how it was split, seed included.
        test: what the figures are measured on: "test pixels of the field_cut split".
        held_out: what the thresholds were fitted on.
        held_out_samples: how many; None: not given.
        model: the architecture.
        arguments: what the architecture was given, by name.
        device: processor or accelerator, threads.
        versions: by package.
        commit: of the code.
        date: of the measurement, with the time zone.
        timed: how the times in the table were measured: "batch 64, 1 thread, ONNX Runtime".
        more: other facts by name: the command, the load average, the seed.
    """

    data: str
    test: str
    held_out: str = ""
    held_out_samples: int | None = None
    model: str = ""
    arguments: Mapping[str, object] = field(default_factory=dict)
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = ""
    date: str = ""
    timed: str = ""
    more: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """Another network to compare with: its mean MACs and ms per sample, its accuracy on the same samples.

    `macs` is None for what has no MACs to count: a support vector machine, say.
    """

    name: str
    macs: float | None
    accuracy: float
    ms: float | None = None


@dataclass(frozen=True)
class Timing:
    """Measured milliseconds per sample.

    Attributes:
        how: masked, sparse or exported; engine, batch size, threads: "sparse, ONNX Runtime, batch 64, 1 thread".
        full: of the full model, run the same way.
        choices: of every choice, in their order; None where not measured.
    """

    how: str
    full: float
    choices: Sequence[float | None]


@dataclass(frozen=True)
class Promise:
    """A risk that was asked for. `tested` samples were tested, others proposed the thresholds; None: not given."""

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
        full_ms: per sample, measured as a whole or else the time of the last exit; None: neither.
        full_interval: 95 % interval of its accuracy.
        full_class_mean: as in `Operation`.
        full_kappa: as in `Operation`.
        unbalanced: classes differ so much in size that the mean of the classes says something of its own.
        operations: one per choice.
        explained: which of them is looked at in detail.
        line: outcomes along the frontier, on the test samples.
        random: the same shares drawn by lot.
        alone: every exit but the last alone.
        static: other networks.
        timing: of whole runs; None: not measured.
        exits: at the explained operation.
        classes: at the explained operation, the dearest first.
        absent: names of the classes without a test sample.
        easy: samples; see `samples`.
        hard: samples.
        mistakes: samples.
        shown: what can be shown of samples; None: nothing.
        usual_spectra: (C, bands), the mean of every class, NaN where it has no test sample; None: no spectra.
        promises: of the choices with a risk.
        scene: maps; None: no scene.
        scene_shares: where in the scene the compute went.
    """

    title: str
    origin: Origin
    class_names: tuple[str, ...]
    samples: int
    full: Outcome
    full_ms: float | None
    full_interval: tuple[float, float]
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
    scene: SceneMaps | None
    scene_shares: tuple[SceneShare, ...]

    @property
    def operation(self) -> Operation:
        """The explained one."""
        return self.operations[self.explained]

    @property
    def how_timed(self) -> str:
        """Where times come from; "": nowhere."""
        if self.timing is not None:
            return f"Measured: {self.timing.how}."
        if self.full.ms is None:
            return ""
        how = f" ({self.origin.timed})" if self.origin.timed else ""
        return f"Times are sums of the measured times of the exits{how}, not of whole runs."


def find(
    test: ExitTable,
    choices: Sequence[OperatingPoint],
    origin: Origin,
    class_names: Sequence[str],
    *,
    title: str = "Where the compute went",
    line: Sequence[OperatingPoint] = (),
    static: Sequence[Point] = (),
    timing: Timing | None = None,
    shown: Samples | None = None,
    scene: SceneMaps | None = None,
    explain: int | None = None,
) -> Findings:
    """Everything that a report shows, from the table of test samples.

    Args:
        test: with labels; `calibrate.tabulate` over the test loader makes one. The thresholds must come from other
            samples.
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
        explain: which choice is looked at in detail; None: see `half_way`.

    Raises:
        DataError: a table without labels, labels without a name, figures whose number does not fit.
        ConfigError: no choices, or `explain` is none of them.
    """
    labels = _checked_labels(test, class_names)
    if timing is not None and len(timing.choices) != len(choices):
        raise DataError(
            f"{len(timing.choices)} times for {len(choices)} choices; give one for each, None: not measured"
        )
    if shown is not None:
        shown.check(test.samples, scene)
    if scene is not None:
        scene.check(len(class_names))
    explain = half_way(test, choices) if explain is None else explain
    if not 0 <= explain < len(choices):
        raise ConfigError(f"explain={explain}, but there are {len(choices)} choices; give an index from 0")
    times = [None] * len(choices) if timing is None else timing.choices
    operations = tuple(operate(test, choice, ms) for choice, ms in zip(choices, times, strict=True))
    exits = operations[explain].exits
    counts = np.bincount(labels, minlength=len(class_names))
    *alone, full = anytime_curve(test)
    points = tuple(outcome(test, choice.thresholds) for choice in line)
    return Findings(
        title=title,
        origin=origin,
        class_names=tuple(class_names),
        samples=test.samples,
        full=full,
        full_ms=full.ms if timing is None else timing.full,
        full_interval=wilson(full.accuracy, test.samples),
        full_class_mean=class_mean(labels, test.answers[:, -1]),
        full_kappa=kappa(labels, test.answers[:, -1]),
        unbalanced=bool(counts.max() > 1.5 * counts[counts > 0].min()),
        operations=operations,
        explained=explain,
        line=points,
        random=tuple(random_exits(test, point.share) for point in points),
        alone=tuple(alone),
        static=tuple(static),
        timing=timing,
        exits=exit_shares(test, exits),
        classes=class_shares(test, exits, class_names),
        absent=tuple(name for name, count in zip(class_names, counts, strict=True) if not count),
        easy=easiest(test, exits),
        hard=hardest(test, exits),
        mistakes=surest_mistakes(test, exits),
        shown=shown,
        usual_spectra=None if shown is None else usual_spectra(shown, labels, len(class_names)),
        promises=tuple(_promise(each, origin.held_out_samples) for each in operations if each.risky),
        scene=scene,
        scene_shares=() if scene is None else where_in_scene(scene),
    )


def half_way(test: ExitTable, choices: Sequence[OperatingPoint]) -> int:
    """Which choice is explained: without a risk, if there is one, and spending nearest to half of the full MACs.

    Raises:
        ConfigError: no choices.
    """
    if not choices:
        raise ConfigError("a report needs at least one choice; give frontier.choose(budget)")
    spent = [outcome(test, choice.thresholds).macs / test.mean_macs[-1] for choice in choices]
    return min(range(len(choices)), key=lambda i: (choices[i].budget.risk is not None, abs(spent[i] - 0.5)))


def _checked_labels(test: ExitTable, names: Sequence[str]) -> np.ndarray:
    if test.labels is None:
        raise DataError("a report needs the labels of the test samples; make the table with calibrate.tabulate")
    low, high = int(test.labels.min()), max(int(test.labels.max()), int(test.answers.max()))
    if low < 0 or high >= len(names):
        raise DataError(f"classes from {low} to {high}, but {len(names)} class names; give one for each, from 0 on")
    return test.labels


def _promise(operation: Operation, held_out: int | None) -> Promise:
    asked = operation.choice.budget
    assert asked.risk is not None, "callers check"
    tested = None if held_out is None else held_out - math.ceil(GRID_SHARE * held_out)
    return Promise(operation, asked.risk, asked.confidence, bool(operation.choice.promised), tested)
