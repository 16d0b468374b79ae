"""The report of a run, and networks to compare it with."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dynanet import inspect
from dynanet.bench.machine import facts
from dynanet.core.cost import CostModel
from dynanet.core.errors import ConfigError
from dynanet.experiment import Problem
from dynanet.infer.session import Session
from dynanet.runs import Run
from dynanet.scenes import PRICED

BATCH = 64  # at which milliseconds are measured


def report(run: Run, path: Path | None = None, *, static: Sequence[inspect.Point] = ()) -> Path:
    """Write report.html, with other networks to compare with."""
    frontier, table, problem = run.frontier(), run.test_table(), run.problem
    model = frontier.model
    session = Session(model, problem.example(), batches=(BATCH,))
    ms = np.cumsum([min(unit[BATCH].values()) / BATCH if unit else np.nan for unit in _measured(session)])
    if len(ms) == table.exits and np.isfinite(ms).all():
        table, frontier = replace(table, ms=ms), frontier.timed(ms)
    versions = facts()
    origin = inspect.Origin(
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
        shown = inspect.Samples(
            spectra=pines.cube[:, positions[:, 0], positions[:, 1]].T.numpy(),
            wavelengths_nm=np.asarray(pines.wavelengths_nm),
            unit="standardised reflectance",
            positions=positions.numpy(),
        )
    elif problem.channels in (1, 3):
        shown = inspect.Samples(pictures=_pictures(problem))
    findings = inspect.find(
        table, run.choices(), origin, problem.classes, title=problem.title, line=frontier.curve(), static=static,
        shown=shown, scene=scene,
    )  # fmt: skip
    path = path if path is not None else run.folder / "report.html"
    inspect.write_report(findings, path)
    return path


@torch.no_grad()
def point(run: Run) -> inspect.Point:
    """A network with one answer, to compare others with: its test accuracy, MACs, and ms at a batch of 64.

    Raises:
        ConfigError: a run of a network with exits.
    """
    model, problem = run.model(), run.problem
    if not isinstance(model, nn.Sequential):
        kind = type(model).__name__
        raise ConfigError(f"{run.folder} is the run of a {kind}; expected one of a network with one answer")
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in problem.test)
    if problem.scene is None:
        macs = CostModel(model, problem.example()).full
    else:  # as those with exits are priced: the stem once per pixel
        stem, rest, pixels = model[0], model[1:], problem.scene.cube[None, :, :PRICED, :PRICED]
        macs = CostModel(stem, pixels).full / PRICED**2 + CostModel(rest, stem(problem.example())).full
    (measured,) = _measured(Session(model, problem.example(), batches=(BATCH,))) or [{}]
    ms = min(measured[BATCH].values()) / BATCH if measured else None
    return inspect.Point(run.folder.name, macs, right / problem.test.samples, ms)


def _measured(session: Session) -> list[dict[int, dict[str, float]]]:
    return list(session.units.values())


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def _pictures(problem: Problem) -> np.ndarray:
    """The test images as they were, uint8."""
    x = torch.cat([x for x, _ in problem.test])
    if problem.mean is not None and problem.std is not None:
        x = x * torch.tensor(problem.std)[:, None, None] + torch.tensor(problem.mean)[:, None, None]
    pictures = (255 * x).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return pictures[..., 0] if pictures.shape[-1] == 1 else pictures
