"""Findings: the figures of a report, computed from tables without running a model or drawing.

"Full" is the model whose samples all leave at the last exit: the reference for accuracy, MACs and time.
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
from dynanet.report.evaluation import ClassShare, Evaluation, ExitShare, class_shares, evaluate, exit_shares
from dynanet.report.samples import Sample, Samples, class_spectra, confident_mistakes, easiest, hardest
from dynanet.report.scene import SceneMaps, SceneShare, where_in_scene
from dynanet.report.statistics import class_mean, kappa, wilson
from dynanet.report.words import pairs


@dataclass(frozen=True)
class Origin:
    """Where figures come from. Empty entries are shown as not given.

    Attributes:
        data: the data set and how it was split, seed included.
        test: the data that the figures are measured on: "test pixels of the field_cut split".
        held_out: the data that the thresholds were fitted on.
        held_out_samples: how many; None: not given.
        model: the architecture.
        arguments: of the architecture, by name.
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

    @property
    def network(self) -> str:
        """The model with its arguments."""
        given = pairs(self.arguments)
        return f"{self.model} ({given})" if self.model and given else self.model or given

    def known(self) -> dict[str, object]:
        """The entries that every report lists, by name."""
        return {
            "data": self.data,
            "model": self.network,
            "device": self.device,
            "versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "commit": self.commit,
            "date": self.date,
            **self.more,
        }


@dataclass(frozen=True)
class Point:
    """Another network to compare with: its mean MACs and ms per sample, its accuracy on the same samples.

    `macs` is None for models without MACs to count, such as a support vector machine.
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
        points: of every operating point, in their order; None where not measured.
    """

    how: str
    full: float
    points: Sequence[float | None]


@dataclass(frozen=True)
class Promise:
    """A requested risk.

    Attributes:
        evaluation: of its operating point.
        risk: of the budget.
        confidence: of the budget.
        kept: the risk is promised.
        tested: how many held-out samples tested the thresholds; others proposed them. None: not given.
    """

    evaluation: Evaluation
    risk: float
    confidence: float
    kept: bool
    tested: int | None


@dataclass(frozen=True, eq=False)
class Findings:
    """The figures of a report.

    Attributes:
        title: of the report.
        origin: where the figures come from.
        class_names: by index.
        samples: number of test samples.
        full: all samples at the last exit.
        full_ms: per sample, measured as a whole or else the time of the last exit; None: neither.
        full_interval: 95 % interval of its accuracy.
        full_class_mean: as in `Evaluation`.
        full_kappa: as in `Evaluation`.
        unbalanced: class sizes differ by so much that the mean class accuracy is shown too.
        evaluations: one per operating point.
        explained: the index of the one that the report explains in detail.
        line: outcomes along the frontier, on the test samples.
        random: random exits with the same shares as `line`.
        alone: every exit but the last alone.
        static: other networks.
        timing: of whole runs; None: not measured.
        exits: at the explained operating point.
        classes: at the explained operating point, most expensive first.
        absent: names of the classes without a test sample.
        easy: samples; see `report.samples`.
        hard: samples.
        mistakes: samples.
        shown: pictures, spectra and names of samples; None: nothing.
        class_spectra: (C, bands), the mean of every class, NaN where it has no test sample; None: no spectra.
        promises: of the operating points with a risk.
        scene: maps; None: no scene.
        scene_shares: compute and accuracy by part of the scene.
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
    evaluations: tuple[Evaluation, ...]
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
    class_spectra: np.ndarray | None
    promises: tuple[Promise, ...]
    scene: SceneMaps | None
    scene_shares: tuple[SceneShare, ...]

    @property
    def evaluation(self) -> Evaluation:
        """The operating point that the report explains, on the test samples."""
        return self.evaluations[self.explained]

    @property
    def how_timed(self) -> str:
        """How times were measured; "" if they were not."""
        if self.timing is not None:
            return f"Measured: {self.timing.how}."
        if self.full.ms is None:
            return ""
        how = f" ({self.origin.timed})" if self.origin.timed else ""
        return f"Times are sums of the measured times of the exits{how}, not of whole runs."


def find(
    test: ExitTable,
    points: Sequence[OperatingPoint],
    origin: Origin,
    class_names: Sequence[str],
    *,
    title: str = "Early exit report",
    line: Sequence[OperatingPoint] = (),
    static: Sequence[Point] = (),
    timing: Timing | None = None,
    shown: Samples | None = None,
    scene: SceneMaps | None = None,
    explain: int | None = None,
) -> Findings:
    """Compute all figures of a report from the table of test samples.

    Args:
        test: with labels; `calibrate.tabulate` over the test loader makes one. The thresholds must come from other
            samples.
        points: operating points, chosen on held-out data: `frontier.choose(budget)`. Those with a risk use the default
            losses of `choose`.
        origin: where the figures come from.
        class_names: by index.
        title: of the report.
        line: operating points along the frontier, `frontier.curve()`, for the line of accuracy against cost.
        static: other networks, measured on the same samples.
        timing: measured speed of the operating points; without it speeds follow from the table's `ms`, if it has them.
        shown: pictures, spectra or names of the test samples, in the table's order.
        scene: the maps of an image, at the explained operating point.
        explain: the index of the operating point to explain in detail; None: see `half_way`.

    Raises:
        DataError: a table without labels, labels without a name, a wrong number of times or samples.
        ConfigError: no operating points, or `explain` is not the index of one.
    """
    labels = _checked_labels(test, class_names)
    times = _times(timing, len(points))
    if shown is not None:
        shown.check(test.samples, scene)
    if scene is not None:
        scene.check(len(class_names))
    explain = half_way(test, points) if explain is None else explain
    if not 0 <= explain < len(points):
        raise ConfigError(f"explain must be an index from 0 to {len(points) - 1}, got {explain}")
    evaluations = tuple(evaluate(test, point, ms) for point, ms in zip(points, times, strict=True))
    exits = evaluations[explain].exits
    counts = np.bincount(labels, minlength=len(class_names))
    *alone, full = anytime_curve(test)
    outcomes = tuple(outcome(test, point.thresholds) for point in line)
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
        evaluations=evaluations,
        explained=explain,
        line=outcomes,
        random=tuple(random_exits(test, each.share) for each in outcomes),
        alone=tuple(alone),
        static=tuple(static),
        timing=timing,
        exits=exit_shares(test, exits),
        classes=class_shares(test, exits, class_names),
        absent=tuple(name for name, count in zip(class_names, counts, strict=True) if not count),
        easy=easiest(test, exits),
        hard=hardest(test, exits),
        mistakes=confident_mistakes(test, exits),
        shown=shown,
        class_spectra=None if shown is None else class_spectra(shown, labels, len(class_names)),
        promises=tuple(_promise(each, origin.held_out_samples) for each in evaluations if each.risky),
        scene=scene,
        scene_shares=() if scene is None else where_in_scene(scene),
    )


def half_way(test: ExitTable, points: Sequence[OperatingPoint]) -> int:
    """The index of the operating point nearest to half of the full MACs, of those without a risk if there are any.

    Raises:
        ConfigError: no operating points.
    """
    if not points:
        raise ConfigError("a report needs at least one operating point; give frontier.choose(budget)")
    spent = [outcome(test, point.thresholds).macs / test.mean_macs[-1] for point in points]
    return min(range(len(points)), key=lambda i: (points[i].budget.risk is not None, abs(spent[i] - 0.5)))


def _times(timing: Timing | None, points: int) -> Sequence[float | None]:
    if timing is None:
        return [None] * points
    if len(timing.points) != points:
        raise DataError(f"timing needs one time per operating point ({points}), or None; got {len(timing.points)}")
    return timing.points


def _checked_labels(test: ExitTable, names: Sequence[str]) -> np.ndarray:
    if test.labels is None:
        raise DataError("a report needs the labels of the test samples; make the table with calibrate.tabulate")
    low = int(test.labels.min())
    high = max(int(test.labels.max()), int(test.answers.max()))
    if low < 0 or high >= len(names):
        raise DataError(f"got {len(names)} class names for classes from {low} to {high}; give one for each, from 0 on")
    return test.labels


def _promise(evaluation: Evaluation, held_out: int | None) -> Promise:
    budget = evaluation.point.budget
    assert budget.risk is not None, "callers check"
    tested = None if held_out is None else held_out - math.ceil(GRID_SHARE * held_out)
    return Promise(evaluation, budget.risk, budget.confidence, bool(evaluation.point.promised), tested)
