"""The report of a run, and the figures of other networks to compare it with."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynanet import report as pages
from dynanet.bench.machine import facts
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, layers, record
from dynanet.core.errors import ConfigError
from dynanet.core.trace import Trace
from dynanet.datamodules.module import DataModule
from dynanet.experiment.evaluation import AS_TRAINED, scored
from dynanet.experiment.run import Run
from dynanet.experiment.scene import exit_macs, static_macs
from dynanet.session.session import Session
from dynanet.tasks.task import spent_macs

BATCH = 64  # at which milliseconds are measured
SHOWN = 6  # images in the report of a task whose answers lie in the image
TEST = "test split, looked at once"


def write_report(run: Run, path: Path | None = None, *, static: Sequence[pages.Point] = ()) -> Path:
    """Write the report of a run, one HTML file.

    Args:
        run: evaluated, or at least calibrated; trained without exits.
        path: of the file; report.html in the run's folder if None.
        static: other networks to show beside it, of `static_point`.

    Returns:
        The path.
    """
    by_table = run.has_exits and not run.data.task.figures
    findings = _exit_findings(run, static) if by_table else _image_findings(run, static)
    path = path if path is not None else run.folder / "report.html"
    pages.write_report(findings, path)
    return path


@torch.no_grad()
def static_point(run: Run) -> pages.Point:
    """A network to compare others with: its main test figure, its MACs, and ms at a batch of 64.

    Whole answers are scored, without ms, where the task needs it or the network decides something.

    Raises:
        ConfigError: a run of a network with exits.
    """
    model, data = run.model, run.data
    name = run.folder.name
    if run.has_exits and not data.task.figures:
        raise ConfigError(
            f"{run.folder} is the run of a {type(model).__name__}; expected one of a network with one answer"
        )
    figures = scored(AS_TRAINED, model, data, run.cost)
    right = next(value for key, value in figures.items() if key not in ("name", "macs", "by_class"))
    if not data.task.tabulated or data.task.figures or layers(model):
        return pages.Point(name, figures["macs"], right)
    macs = run.cost.full
    if data.scene is not None and isinstance(model, nn.Sequential):
        macs = static_macs(model, data.scene, data.example())  # as networks with exits are priced
    measured = Session(model, data.example(), batches=(BATCH,)).units.get("", {})  # the whole is one unit
    ms = min(measured[BATCH].values()) / BATCH if measured else None
    return pages.Point(name, macs, right, ms)


def _exit_findings(run: Run, static: Sequence[pages.Point]) -> pages.Findings:
    """Of a task that is scored from the table of exits."""
    frontier, table = run.frontier, run.test_table
    data = run.data
    ms = _exit_ms(Session(run.model, data.example(), batches=(BATCH,)), table.exits)
    if np.isfinite(ms).all():
        table, frontier = replace(table, ms=ms), frontier.timed(ms)
    scene, more = None, {}
    if data.scene is not None and exit_macs(run.model, data.scene) is not None:
        scene, seconds = run.scene(rounds=2)
        more["whole scene"] = (
            f"{seconds['seconds']:.2f} s at {seconds['macs_share']:.0%} of the MACs, "
            f"{seconds['full_seconds']:.2f} s in full: {seconds['speed_up']:.2f} times faster"
        )
    origin = _origin(
        run,
        ("dynanet", "torch", "onnxruntime"),
        more,
        held_out="held-out split, not augmented",
        held_out_samples=frontier.table.samples,
        timed=f"batch {BATCH}, {_threads()}, every exit in its faster engine",
    )
    return pages.find(
        table, run.operating_points, origin, data.classes, title=data.title, line=frontier.curve(), static=static,
        shown=_test_samples(data), scene=scene,
    )  # fmt: skip


def _test_samples(data: DataModule) -> pages.Samples | None:
    """What can be shown of all test samples: spectra of a scene, or pictures."""
    if data.scene is not None:
        positions = data.scene.positions("test")
        return pages.Samples(
            spectra=data.scene.cube[:, positions[:, 0], positions[:, 1]].T.numpy(),
            wavelengths_nm=np.asarray(data.scene.wavelengths_nm),
            unit="standardised reflectance",
            positions=positions.numpy(),
        )
    pictures = [found for x, _ in data.test if (found := data.inputs.pictures(x)) is not None]
    return pages.Samples(pictures=np.concatenate(pictures)) if pictures else None


def _image_findings(run: Run, static: Sequence[pages.Point]) -> pages.ImageFindings:
    """Of a task whose answers lie in the image, or of a network without exits."""
    results, data = run.results(), run.data
    model, setting = run.explained()
    examined = _examine(execute(model, sparse=True), data, run.cost)
    points = {
        each["name"]: (each["macs"], {k: v for k, v in each.items() if k not in ("name", "macs", "by_class")})
        for each in results["points"]
    }
    explained = next(each for each in results["points"] if each["name"] == setting)
    return pages.ImageFindings(
        title=f"{run.experiment.model.name} on {data.title}",
        origin=_origin(run, ("dynanet", "torch"), {}),
        class_names=data.classes,
        full_macs=run.cost.full,
        points=points,
        by_class={figure: list(each.values()) for figure, each in explained["by_class"].items()},
        beside=_beside_boxes(examined),
        static=static,
        shown=examined.shown,
        setting=setting,
    )


@dataclass
class _Examined:
    """What a pass over the test images left: some images, and of all of them units per pixel (B, H, W), and boxes."""

    shown: list[pages.Shown] = field(default_factory=list)
    units: list[Tensor] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def _examine(model: nn.Module, data: DataModule, cost: CostModel) -> _Examined:
    found = _Examined()
    for x, y in data.test:
        with record(model) as trace:
            answer = model(x)
        units = _units(trace, data)
        if units is not None:
            found.units.append(units)
        found.boxes += data.task.true_boxes(y)
        if len(found.shown) < SHOWN:
            spent = spent_macs(trace, cost, len(y))
            found.shown += list(_shown(data, x, y, answer, units, spent, first=len(found.shown)))
    return found


def _units(trace: Trace, data: DataModule) -> Tensor | None:
    """Units that ran for every pixel, (B, H, W); None where nothing decided about positions."""
    size = data.inputs.image_size()
    if size is None or not pages.places(trace, size):
        return None
    return pages.units_per_position(trace, size)


def _shown(
    data: DataModule, x: Any, y: Tensor, answer: Tensor, units: Tensor | None, spent: Tensor, first: int
) -> Iterator[pages.Shown]:
    """The images of a batch that are shown: those from number `first` on, up to `SHOWN`."""
    size, pictures = data.inputs.image_size(), data.inputs.pictures(x)
    if size is None or pictures is None:
        return
    for k in range(min(len(pictures), SHOWN - first)):
        drawn = data.task.overlay(answer[k : k + 1], y[k : k + 1], data.classes, size)
        yield pages.Shown(
            name=", ".join(filter(None, (f"image {first + k + 1}", drawn.caption))),
            picture=pictures[k],
            macs=float(spent[k]),
            units=None if units is None else units[k].numpy(),
            found=[pages.Box(*box) for box in drawn.found],
            truth=[pages.Box(*box) for box in drawn.truth],
            labels=drawn.labels,
            known=drawn.known,
        )


def _beside_boxes(examined: _Examined) -> dict[str, str]:
    """Whether the compute went where the true boxes are."""
    if not examined.units or not examined.boxes:
        return {}
    inside, outside, correlation = pages.beside_boxes(torch.cat(examined.units), examined.boxes)
    return {
        "units per position": f"{inside:.2f} inside the true boxes, {outside:.2f} outside",
        "correlation with the boxes": f"{correlation:.3f} (point-biserial, over all pixels of the test images)"
        if math.isfinite(correlation)
        else "none: every position ran as many units",
    }


def _origin(run: Run, versions: Sequence[str], more: Mapping[str, str], **rest: Any) -> pages.Origin:
    found = facts()
    return pages.Origin(
        data=run.data.title,
        test=TEST,
        model=run.experiment.model.name,
        arguments=run.experiment.model.arguments,
        device=f"{found['device']}, {_threads()}",
        versions={name: found[name] for name in versions},
        commit=found["commit"],
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        more={"load": found["load"], **more},
        **rest,
    )


def _exit_ms(session: Session, exits: int) -> np.ndarray:
    """(K,) milliseconds per sample that leaves at every exit; NaN from a step on that is not one engine."""
    units = {name.rpartition(".")[2]: unit for name, unit in session.units.items()}
    steps = [units.get(f"step{k}", {}) for k in range(exits)]
    return np.cumsum([min(step[BATCH].values()) / BATCH if step else np.nan for step in steps])


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"
