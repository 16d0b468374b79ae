"""A Table is what one pass over held-out data says about every exit of a model. All choices are made from it."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, forced, layers, record
from dynanet.core.errors import DataError, StructureError
from dynanet.core.files import write_atomically
from dynanet.core.halt import Halt


@dataclass(frozen=True, eq=False)
class Table:
    """N samples, K exits. Nothing here knows torch.

    Attributes:
        scores: (N, K - 1) float64, how sure the model was after every step at which a row may leave. The last step
            asks nobody, so it has no score.
        answers: (N, K) int64, the class every exit gave.
        correct: (N, K) bool.
        macs: (K,) or (N, K) float64, multiply-accumulates of a sample that leaves at exit k, everything before
            included; (N, K) where layers inside the steps decide too.
        ms: (K,) float64, milliseconds per sample that leaves at exit k. None: not measured.
        worst: (K,) float64, `macs` of the dearest path to every exit; what a hard cap is held against. None: the
            largest of `macs`.
        labels: (N,) int64, the true classes, for reports. None: not kept.
        logits: (N, K, C) float32. None: not kept.

    Raises:
        DataError: shapes that do not fit each other, no samples, or values that are not finite.
    """

    scores: np.ndarray
    answers: np.ndarray
    correct: np.ndarray
    macs: np.ndarray
    ms: np.ndarray | None = None
    worst: np.ndarray | None = None
    labels: np.ndarray | None = None
    logits: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, dtype=dtype))
        if self.correct.ndim != 2 or 0 in self.correct.shape:
            raise DataError(f"a table needs correct of shape (samples, exits), neither 0; got {self.correct.shape}")
        n, k = self.correct.shape
        shapes: dict[str, list[tuple[int, ...]]] = {
            "scores": [(n, k - 1)], "answers": [(n, k)], "macs": [(k,), (n, k)], "ms": [(k,)], "worst": [(k,)],
            "labels": [(n,)],
        }  # fmt: skip
        for name, allowed in shapes.items():
            value = getattr(self, name)
            if value is not None and value.shape not in allowed:
                raise DataError(f"{name} of shape {value.shape} in a table of {n} samples, {k} exits; need {allowed}")
        if self.logits is not None and (self.logits.ndim != 3 or self.logits.shape[:2] != (n, k)):
            raise DataError(f"logits of shape {self.logits.shape} in a table of {n} samples and {k} exits")
        for name in ("scores", "macs", "ms", "worst"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value).all():
                raise DataError(f"{name} of a table hold NaN or infinite values; look for them in the model's answers")

    @property
    def samples(self) -> int:
        """N."""
        return self.correct.shape[0]

    @property
    def exits(self) -> int:
        """K."""
        return self.correct.shape[1]

    @property
    def accuracy(self) -> np.ndarray:
        """(K,) of every exit, if all samples leave there."""
        return self.correct.mean(0)

    @property
    def mean_macs(self) -> np.ndarray:
        """(K,) of every exit, if all samples leave there."""
        return self.macs if self.macs.ndim == 1 else self.macs.mean(0)

    @property
    def dearest(self) -> np.ndarray:
        """(K,) MACs that no sample exceeds if it leaves at exit k at the latest."""
        return np.maximum.accumulate(self.worst if self.worst is not None else np.atleast_2d(self.macs).max(0))

    def take(self, rows: np.ndarray) -> "Table":
        """The table of some of its samples, (n,) indices or a mask."""
        held = {name: getattr(self, name) for name in ("scores", "answers", "correct", "labels", "logits")}
        chosen = {name: value[rows] for name, value in held.items() if value is not None}
        return replace(self, **chosen, macs=self.macs if self.macs.ndim == 1 else self.macs[rows])

    def first(self, exits: int) -> "Table":
        """The table of a model that is cut after its first exits."""
        cut = {
            name: value[..., :exits]
            for name in ("answers", "correct", "macs", "ms", "worst")
            if (value := getattr(self, name)) is not None
        }
        logits = None if self.logits is None else self.logits[:, :exits]
        return replace(self, scores=self.scores[:, : exits - 1], logits=logits, **cut)

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz file, whole or not at all."""
        arrays = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

        def write(file: BinaryIO) -> None:
            np.savez_compressed(file, **arrays)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Table":
        """Read what `save` wrote.

        Raises:
            DataError: not such a file, or a damaged one.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files
            said = f"{os.fspath(path)} cannot be read as a calibration table ({error}); make one with infer.calibrate"
            raise DataError(said) from error
        names = {f.name for f in fields(cls)}
        needed = {"scores", "answers", "correct", "macs"}
        if not needed <= set(arrays) <= names:
            raise DataError(f"{os.fspath(path)} holds {sorted(arrays)}; a table has at least {sorted(needed)}")
        return cls(**arrays)


_DTYPES: dict[str, Any] = {
    "scores": np.float64, "answers": np.int64, "correct": np.bool_, "macs": np.float64, "ms": np.float64,
    "worst": np.float64, "labels": np.int64, "logits": np.float32,
}  # fmt: skip


def halt_of(model: nn.Module) -> tuple[str, Halt]:
    """The layer whose exits are chosen, and its name: the outermost Halt, which no other decision may guard.

    Raises:
        StructureError: there is none, there are several side by side, or it runs only if another layer says so.
    """
    found = {name: layer for name, layer in layers(model).items() if isinstance(layer, Halt)}
    outer = {n: h for n, h in found.items() if not any(n != o and (o == "" or n.startswith(o + ".")) for o in found)}
    if len(outer) != 1:
        what = f"has {sorted(outer)} side by side" if outer else "has no layer that halts"
        raise StructureError(f"calibration needs one layer that halts (EarlyExit, say); {type(model).__name__} {what}")
    return next(iter(outer.items()))


@torch.no_grad()
def tabulate(model: nn.Module, loader: Iterable[Any], cost: CostModel, *, keep_logits: bool = False) -> Table:
    """One pass over held-out data, every step run for every sample.

    Thresholds fitted on training data, or through augmentation, are thresholds for other scores: give data that the
    model has not seen, as it will come.

    Args:
        model: with one Halt that answers logits (B, C). Its modes and limit are left as they were.
        loader: batches (x, y); y is (B,) class indices.
        cost: of this model.
        keep_logits: keep the logits of all exits too.

    Raises:
        StructureError: the model has no Halt, several, or one of a single step.
        DataError: no samples; labels that are no class indices; answers that are no logits or not finite.
    """
    name, halt = halt_of(model)
    if halt.steps < 2:
        raise StructureError("calibration needs a model with at least two exits; this one has a single step")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches: list[dict[str, np.ndarray]] = []
    worst = None
    with _every_step(model, halt):
        for x, y in loader:
            x = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, x)
            if y.dim() == 0 or y.shape[0] == 0:
                continue
            if worst is None:
                with forced(model, everything), record(model) as trace:
                    model(tree_map(lambda t: t[:1] if isinstance(t, Tensor) else t, x))
                worst = cost.steps(trace, name)[0].cpu().numpy()
            with record(model) as trace:
                model(x)
            calls = [call for call in trace.calls if call.name == name]
            if any(layer != name for call in calls for layer, _ in call.within):
                raise StructureError(f"the layer {name!r} runs only where another says so; its exits cannot be chosen")
            logits, labels = _checked(trace.answers[name], y)
            scores = [call.decision.score for call in calls]
            if any(score.shape != (len(labels), 1) for score in scores):
                raise StructureError(f"scores of {tuple(scores[0].shape)}; calibration needs (B, 1): one per sample")
            answers = logits.argmax(-1)
            batches.append({
                "scores": torch.cat(scores, 1).double().cpu().numpy(),
                "answers": answers.numpy(),
                "correct": (answers == labels[:, None]).numpy(),
                "macs": cost.steps(trace, name).cpu().numpy(),
                "labels": labels.numpy(),
            } | ({"logits": logits.numpy()} if keep_logits else {}))  # fmt: skip
    if not batches:
        raise DataError("the held-out data has no samples; give a loader of batches (x, y)")
    whole = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    if (whole["macs"] == whole["macs"][0]).all():
        whole["macs"] = whole["macs"][0]
    return Table(worst=worst, **whole)


@contextmanager
def _every_step(model: nn.Module, halt: Halt) -> Iterator[None]:
    """Eval mode, and the halt (not the layers inside it) lets every row go on to the end."""
    modes = {module: module.training for module in model.modules()}
    limit, force = halt.limit, halt.force
    model.eval()
    halt.limit, halt.force = None, everything
    try:
        yield
    finally:
        halt.limit, halt.force = limit, force
        for module, mode in modes.items():
            module.training = mode


def _checked(answers: list[Any], y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, K, C) float32 and labels (B,) int64, both on the CPU."""
    if not all(isinstance(a, Tensor) and a.dim() == 2 for a in answers):
        raise DataError("calibration needs exits that answer logits (samples, classes); these answer something else")
    logits, labels = torch.stack(answers, 1).float().cpu(), y.cpu()
    classes = logits.shape[-1]
    if labels.dim() != 1 or labels.shape[0] != logits.shape[0] or labels.is_floating_point():
        raise DataError(f"labels of shape {tuple(y.shape)} and {y.dtype}; give ({logits.shape[0]},) class indices")
    labels = labels.long()
    if labels.min() < 0 or labels.max() >= classes:
        seen = f"{labels.min().item()} to {labels.max().item()}"
        raise DataError(f"labels from {seen} for a model of {classes} classes; give indices from 0 to {classes - 1}")
    if not logits.isfinite().all():
        raise DataError("the model answers NaN or infinite logits on the held-out data; check the data and the weights")
    return logits, labels
