"""The report of a run, and networks to compare it with."""

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dynanet import report as pages
from dynanet.bench.machine import facts
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, record
from dynanet.core.errors import ConfigError
from dynanet.data.detection import unpadded
from dynanet.experiment.config import Problem
from dynanet.experiment.run import Run
from dynanet.experiment.scene import PRICED
from dynanet.session.session import Session
from dynanet.tasks.detection.decoding import decode
from dynanet.tasks.task import Classification, Detection, Segmentation

BATCH = 64  # at which milliseconds are measured
SHOWN = 6  # images in the report of a task whose answers lie in the image


def report(run: Run, path: Path | None = None, *, static: Sequence[pages.Point] = ()) -> Path:
    """Write report.html, with other networks to compare with."""
    if not run.has_exits() or run.problem.task.figures:
        return _of_images(run, path, static)
    frontier, table, problem = run.frontier(), run.test_table(), run.problem
    model = frontier.model
    session = Session(model, problem.example(), batches=(BATCH,))
    ms = np.cumsum([min(unit[BATCH].values()) / BATCH if unit else np.nan for unit in _measured(session, table.exits)])
    if np.isfinite(ms).all():
        table, frontier = replace(table, ms=ms), frontier.timed(ms)
    versions = facts()
    origin = pages.Origin(
        data=problem.title,
        test="test split, looked at once",
        held_out="held-out split, not augmented",
        held_out_samples=frontier.table.samples,
        model=run.experiment.model.name,
        arguments=run.experiment.model.arguments,
        timed=f"batch {BATCH}, {_threads()}, every exit in its faster engine",
        device=f"{versions['device']}, {_threads()}",
        versions={name: versions[name] for name in ("dynanet", "torch", "onnxruntime")},
        commit=versions["commit"],
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        more={"load": versions["load"]},
    )
    shown, scene = None, None
    if problem.scene is not None:
        scene, seconds = run.scene(rounds=2)
        origin.more["whole scene"] = (
            f"{seconds['seconds']:.2f} s at {seconds['macs_share']:.0%} of the MACs, "
            f"{seconds['full_seconds']:.2f} s in full: {seconds['speed_up']:.2f} times faster"
        )
        pines = problem.scene
        positions = pines.positions("test")
        shown = pages.Samples(
            spectra=pines.cube[:, positions[:, 0], positions[:, 1]].T.numpy(),
            wavelengths_nm=np.asarray(pines.wavelengths_nm),
            unit="standardised reflectance",
            positions=positions.numpy(),
        )
    elif problem.kind == "images" and problem.channels in (1, 3):
        shown = pages.Samples(pictures=_pictures(problem))
    findings = pages.find(
        table, run.choices(), origin, problem.classes, title=problem.title, line=frontier.curve(), static=static,
        shown=shown, scene=scene,
    )  # fmt: skip
    path = path if path is not None else run.folder / "report.html"
    pages.write_report(findings, path)
    return path


@torch.no_grad()
def point(run: Run) -> pages.Point:
    """A network with one answer, to compare others with: its test accuracy, MACs, and ms at a batch of 64.

    Of a task that is not tabulated: its first figure in place of the accuracy, and no ms.

    Raises:
        ConfigError: a run of a network with exits.
    """
    model, problem = run.model(), run.problem
    if not problem.task.tabulated or problem.task.figures:
        score = problem.task.score(execute(model, sparse=True), problem.test, CostModel(model, problem.example()))
        return pages.Point(run.folder.name, score.macs, next(iter(score.figures.values())))
    if not isinstance(model, nn.Sequential):
        kind = type(model).__name__
        raise ConfigError(f"{run.folder} is the run of a {kind}; expected one of a network with one answer")
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in problem.test)
    if problem.scene is None:
        macs = CostModel(model, problem.example()).full
    else:  # as those with exits are priced: the stem once per pixel
        stem, rest, pixels = model[0], model[1:], problem.scene.cube[None, :, :PRICED, :PRICED]
        macs = CostModel(stem, pixels).full / PRICED**2 + CostModel(rest, stem(problem.example())).full
    measured = Session(model, problem.example(), batches=(BATCH,)).units.get("", {})  # the whole is one unit
    ms = min(measured[BATCH].values()) / BATCH if measured else None
    return pages.Point(run.folder.name, macs, right / problem.test.samples, ms)


@torch.no_grad()
def _of_images(run: Run, path: Path | None, static: Sequence[pages.Point]) -> Path:
    """The report of a task whose answers lie in the image, or of a network without exits."""
    results, problem, (model, setting) = run.results(), run.problem, run.explained()
    cost = CostModel(execute(model, sparse=True), problem.example())
    shown: list[pages.Shown] = []
    maps: list[Tensor] = []
    boxes: list[Tensor] = []
    for x, y in problem.test:
        with record(model) as trace:
            answer = model(x)
        spent = cost.spent(trace).tolist() if trace.calls else [cost.full] * len(x)
        units = None
        if problem.kind == "images" and pages.places(trace, problem.size):
            units = pages.units_per_position(trace, problem.size)
            maps.append(units)
        truth = [each.boxes for each in unpadded(y)] if isinstance(problem.task, Detection) else []
        boxes += truth
        pictured = problem.kind == "images" and problem.channels in (1, 3)
        for k in range(min(len(x), SHOWN - len(shown)) if pictured else 0):
            found, wanted = _boxes(answer[k : k + 1], y[k : k + 1], problem)
            picture = _pictures(problem, x[k : k + 1])[0]
            one = None if units is None else units[k].numpy()
            labels, known = _labels(answer[k], y[k], problem)
            name = f"image {len(shown) + 1}"
            if isinstance(problem.task, Classification):
                told, really = int(answer[k].argmax()), int(y[k])
                name += f", {problem.classes[told]}" + ("" if told == really else f" (is {problem.classes[really]})")
            shown.append(pages.Shown(name, picture, spent[k], one, found, wanted, labels, known))
    beside = {}
    if maps and boxes:
        inside, outside, correlation = pages.beside_boxes(torch.cat(maps), boxes)
        beside = {
            "units per position": f"{inside:.2f} inside the true boxes, {outside:.2f} outside",
            "correlation with the boxes": f"{correlation:.3f} (point-biserial, over all pixels of the test images)"
            if math.isfinite(correlation)
            else "none: every position ran as many units",
        }
    points = {
        each["name"]: (each["macs"], {k: v for k, v in each.items() if k not in ("name", "macs", "by_class")})
        for each in results["points"]
    }
    explained = next(each for each in results["points"] if each["name"] == setting)
    by_class = {k: list(each.values()) for k, each in explained["by_class"].items()}
    versions = facts()
    origin = pages.Origin(
        data=problem.title,
        test="test split, looked at once",
        model=run.experiment.model.name,
        arguments=run.experiment.model.arguments,
        device=f"{versions['device']}, {_threads()}",
        versions={name: versions[name] for name in ("dynanet", "torch")},
        commit=versions["commit"],
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        more={"load": versions["load"]},
    )
    findings = pages.ImageFindings(
        f"{run.experiment.model.name} on {problem.title}", origin, problem.classes, cost.full,
        points, by_class, beside, static, shown, setting,
    )  # fmt: skip
    path = path if path is not None else run.folder / "report.html"
    pages.write_report(findings, path)
    return path


def _boxes(answer: Tensor, y: Tensor, problem: Problem) -> tuple[list[pages.Box], list[pages.Box]]:
    """Found (those worth a look) and true boxes of one image; none where the task has none."""
    if not isinstance(problem.task, Detection):
        return [], []
    (found,), (wanted,) = decode(answer, problem.size, least=0.3), unpadded(y)
    return (
        [pages.Box(*each) for each in zip(*(t.tolist() for t in found), strict=True)],
        [pages.Box(*each) for each in zip(wanted.boxes.tolist(), wanted.labels.tolist(), strict=True)],
    )


def _labels(answer: Tensor, y: Tensor, problem: Problem) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Found and true classes of the pixels of one image; none where the task asks for none."""
    if not isinstance(problem.task, Segmentation):
        return None, None
    return answer.argmax(0).numpy(), torch.where(y == problem.task.void, -1, y).numpy()


def _measured(session: Session, steps: int) -> list[dict[int, dict[str, float]]]:
    """Of every step of the Halt; empty where a step is no engine, but its parts are."""
    units = {name.rpartition(".")[2]: unit for name, unit in session.units.items()}
    return [units.get(f"step{k}", {}) for k in range(steps)]


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def _pictures(problem: Problem, x: Tensor | None = None) -> np.ndarray:
    """Test images as they were, uint8; all of them if none are given."""
    x = torch.cat([x for x, _ in problem.test]) if x is None else x
    if problem.mean is not None and problem.std is not None:
        x = x * torch.tensor(problem.std)[:, None, None] + torch.tensor(problem.mean)[:, None, None]
    pictures = (255 * x).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return pictures[..., 0] if pictures.shape[-1] == 1 else pictures
