"""The exit table: answers, scores and costs of every exit, from one pass over data. Calibration needs nothing else."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import Dynamic, evaluating, everything, forced, layers, record
from dynanet.core.errors import DataError, StructureError
from dynanet.core.files import write_atomically
from dynanet.core.halt import Halt

POSITIONS = 500  # of an image that get a row; neighbouring positions are nearly redundant


@dataclass(frozen=True, eq=False)
class ExitTable:
    """Answers, scores and costs of N rows at K exits, as numpy arrays.

    A row is a sample; where positions of an image leave one by one, a position (see `groups`).

    Attributes:
        scores: (N, K - 1) float64, the score after every step at which a row may leave. Rows always leave at the last
            step, so it has no score.
        answers: (N, K) int64, the class that every exit predicts.
        correct: (N, K) bool.
        macs: (K,) or (N, K) float64, multiply-accumulates of a sample that leaves at exit k, everything before
            included; (N, K) where layers inside the steps decide too. With groups: of a sample all of whose rows do.
        ms: (K,) float64, milliseconds per sample that leaves at exit k. None: not measured.
        worst: (K,) float64, `macs` of the most expensive path to every exit, which a hard cap limits. None: the
            largest of `macs`.
        labels: (N,) int64, the true classes, for reports. None: not kept.
        logits: (N, K, C) float32. None: not kept.
        groups: (N,) int64, the sample that a row is a position of. None: rows are samples.

    Raises:
        DataError: shapes that do not match, no samples, or values that are not finite.
    """

    scores: np.ndarray
    answers: np.ndarray
    correct: np.ndarray
    macs: np.ndarray
    ms: np.ndarray | None = None
    worst: np.ndarray | None = None
    labels: np.ndarray | None = None
    logits: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, dtype=dtype))
        if self.correct.ndim != 2 or 0 in self.correct.shape:
            raise DataError(f"correct must have shape (samples, exits), neither 0; got {self.correct.shape}")
        n, k = self.correct.shape
        shapes: dict[str, list[tuple[int, ...]]] = {
            "scores": [(n, k - 1)], "answers": [(n, k)], "macs": [(k,), (n, k)], "ms": [(k,)], "worst": [(k,)],
            "labels": [(n,)], "groups": [(n,)],
        }  # fmt: skip
        for name, allowed in shapes.items():
            value = getattr(self, name)
            if value is not None and value.shape not in allowed:
                raise DataError(
                    f"{name} of a table of {n} samples and {k} exits must have one of the shapes {allowed}, got "
                    f"{value.shape}"
                )
        if self.logits is not None and (self.logits.ndim != 3 or self.logits.shape[:2] != (n, k)):
            raise DataError(f"logits must have shape ({n}, {k}, classes), got {self.logits.shape}")
        for name in ("scores", "macs", "ms", "worst"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value).all():
                raise DataError(f"{name} of a table must be finite; look for NaN or infinity in the model's answers")

    @property
    def samples(self) -> int:
        """The number of rows, N."""
        return self.correct.shape[0]

    @property
    def exits(self) -> int:
        """The number of exits, K."""
        return self.correct.shape[1]

    @property
    def accuracy(self) -> np.ndarray:
        """The accuracy of every exit if all samples leave there, (K,)."""
        return self.correct.mean(0)

    @property
    def mean_macs(self) -> np.ndarray:
        """The mean MACs of every exit if all samples leave there, (K,)."""
        return self.macs if self.macs.ndim == 1 else self.macs.mean(0)

    @property
    def most_expensive(self) -> np.ndarray:
        """The MACs of the most expensive path that leaves at exit k at the latest, (K,)."""
        return np.maximum.accumulate(self.worst if self.worst is not None else np.atleast_2d(self.macs).max(0))

    def take(self, rows: np.ndarray) -> "ExitTable":
        """The table of a subset of rows, given by (n,) indices or a mask."""
        held = {name: getattr(self, name) for name in ("scores", "answers", "correct", "labels", "logits", "groups")}
        chosen = {name: value[rows] for name, value in held.items() if value is not None}
        return replace(self, **chosen, macs=self.macs if self.macs.ndim == 1 else self.macs[rows])

    def first(self, exits: int) -> "ExitTable":
        """The table of a model that is cut after its first exits."""
        cut = {
            name: value[..., :exits]
            for name in ("answers", "correct", "macs", "ms", "worst")
            if (value := getattr(self, name)) is not None
        }
        logits = None if self.logits is None else self.logits[:, :exits]
        return replace(self, scores=self.scores[:, : exits - 1], logits=logits, **cut)

    def save(self, path: str | os.PathLike) -> None:
        """Write an .npz file, atomically."""
        arrays = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

        def write(file: BinaryIO) -> None:
            np.savez_compressed(file, **arrays)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ExitTable":
        """Read what `save` wrote.

        Raises:
            DataError: not a file of `save`, or a damaged one.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # numpy and zipfile raise many types for damaged files
            raise DataError(
                f"{os.fspath(path)} cannot be read as a calibration table ({error}); make one with calibrate.calibrate"
            ) from error
        needed = {"scores", "answers", "correct", "macs"}
        if not needed <= set(arrays) <= _DTYPES.keys():
            raise DataError(f"{os.fspath(path)} holds {sorted(arrays)}; a table has at least {sorted(needed)}")
        return cls(**arrays)


_DTYPES: dict[str, Any] = {
    "scores": np.float64, "answers": np.int64, "correct": np.bool_, "macs": np.float64, "ms": np.float64,
    "worst": np.float64, "labels": np.int64, "logits": np.float32, "groups": np.int64,
}  # fmt: skip


def halt_of(model: nn.Module) -> tuple[str, Dynamic]:
    """The name of the layer to calibrate, and the layer.

    It is the outermost Halt, or a layer with thresholds whose rows stay in the batch (`PixelCascade`).

    Raises:
        StructureError: there is none, or there are several side by side.
    """
    found = {n: each for n, each in layers(model).items() if isinstance(each, Halt) or thresholds_of(each) is not None}
    outer = {n: h for n, h in found.items() if not any(n != o and (o == "" or n.startswith(o + ".")) for o in found)}
    if len(outer) != 1:
        what = f"has {sorted(outer)} side by side" if outer else "has no layer that halts"
        raise StructureError(f"calibration needs one layer that halts (as EarlyExit); {type(model).__name__} {what}")
    return next(iter(outer.items()))


def thresholds_of(layer: nn.Module) -> Tensor | None:
    """The buffer `thresholds` that calibration sets; None where a layer has none."""
    return dict(layer.named_buffers(recurse=False)).get("thresholds")


def exits_of(layer: Dynamic) -> int:
    """How many exits a layer of `halt_of` has."""
    if isinstance(layer, Halt):
        return layer.steps
    thresholds = thresholds_of(layer)
    assert thresholds is not None, "halt_of finds no others"
    return 1 + len(thresholds)


@torch.no_grad()
def tabulate(
    model: nn.Module, loader: Iterable[Any], cost: CostModel, *, keep_logits: bool = False, ignore: int | None = None
) -> ExitTable:
    """Make an exit table from one pass over held-out data, in which every sample takes every step.

    Give data that the model was not trained on, without augmentation: on training data scores are too high, and
    thresholds fitted to them do not transfer.

    Where positions leave one by one, rows are positions, labelled with the pixel at their centre: up to `POSITIONS`
    evenly spaced ones per image. Positions are taken to be independent: the table does not show that a later stage sees
    less context once its neighbours have left, so measure thresholds on whole images.

    Args:
        model: with one Halt that answers logits (B, C), or a layer with thresholds that answers (B, C, h, w). Its modes
            and limit are restored.
        loader: batches (x, y); y is (B,) class indices, or (B, H, W) with one per pixel.
        cost: of this model.
        keep_logits: keep the logits of all exits too.
        ignore: the label of rows to leave out.

    Raises:
        StructureError: the model has no Halt, several, or one of a single step.
        DataError: no (labelled) samples; labels that are not class indices, or of another size than the answers;
            answers that are not logits or not finite.
    """
    name, halt = halt_of(model)
    if exits_of(halt) < 2:
        raise StructureError("calibration needs a model with at least two exits; this one has a single step")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    collector = _Collector(model, name, cost, keep_logits, ignore)
    with _every_step(model, halt):
        for x, y in loader:
            if y.dim() > 0 and y.shape[0] > 0:
                collector.add(tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, x), y)
    return collector.table()


class _Collector:
    """Gathers the rows of an exit table, batch by batch, from a model whose halt runs every step."""

    def __init__(self, model: nn.Module, name: str, cost: CostModel, keep_logits: bool, ignore: int | None) -> None:
        self.model = model
        self.name = name
        self.cost = cost
        self.keep_logits = keep_logits
        self.ignore = ignore
        self.samples = 0
        self.worst: np.ndarray | None = None
        self.batches: list[dict[str, np.ndarray]] = []

    def add(self, x: Any, y: Tensor) -> None:
        """Run the model on a batch and keep the rows that have labels."""
        if self.worst is None:
            self.worst = self._most_expensive(x)
        with record(self.model) as trace:
            answer = self.model(x)
        calls = [call for call in trace.calls if call.name == self.name]
        if any(call.around.keys() - {self.name} for call in calls):
            raise StructureError(
                f"the layer {self.name!r} runs only where another layer keeps a row; its exits cannot be calibrated"
            )
        scores = [call.decision.score for call in calls]
        rows = _rows(trace.answers[self.name], scores, answer, y, self.ignore)
        answers = rows.logits.argmax(-1)
        batch = {
            "scores": rows.scores.double(),
            "answers": answers,
            "correct": answers == rows.labels[:, None],
            "macs": self.cost.steps(trace, self.name).cpu()[rows.samples],
            "labels": rows.labels,
        }
        if self.keep_logits:
            batch["logits"] = rows.logits
        if y.dim() > 1:
            batch["groups"] = self.samples + rows.samples
        self.batches.append({key: value.numpy() for key, value in batch.items()})
        self.samples += y.shape[0]

    def table(self) -> ExitTable:
        """The table of all batches."""
        if not self.batches:
            raise DataError("the held-out data has no samples; give a loader of batches (x, y)")
        if not any(len(batch["labels"]) for batch in self.batches):
            raise DataError(
                f"all labels of the held-out data are {self.ignore}, the ignored one; give data with labels"
            )
        whole = {key: np.concatenate([batch[key] for batch in self.batches]) for key in self.batches[0]}
        if (whole["macs"] == whole["macs"][:1]).all():
            whole["macs"] = whole["macs"][0]
        return ExitTable(worst=self.worst, **whole)

    def _most_expensive(self, x: Any) -> np.ndarray:
        """MACs (K,) up to every exit of a sample for which every unit runs."""
        with forced(self.model, everything), record(self.model) as trace:
            self.model(tree_map(lambda t: t[:1] if isinstance(t, Tensor) else t, x))
        return self.cost.steps(trace, self.name)[0].cpu().numpy()


@contextmanager
def _every_step(model: nn.Module, halt: Dynamic) -> Iterator[None]:
    """Inside, the model is in eval mode and the halt (not the layers inside it) runs every step for every row."""
    limit = halt.limit if isinstance(halt, Halt) else None
    force = halt.force
    halt.force = everything
    if isinstance(halt, Halt):
        halt.limit = None
    try:
        with evaluating(model):
            yield
    finally:
        halt.force = force
        if isinstance(halt, Halt):
            halt.limit = limit


class _Rows(NamedTuple):
    """R rows of a batch, on the CPU.

    Attributes:
        logits: (R, K, C) float32.
        labels: (R,) int64.
        scores: (R, K - 1).
        samples: (R,), the sample of the batch that each row is of.
    """

    logits: Tensor
    labels: Tensor
    scores: Tensor
    samples: Tensor


def _rows(answers: list[Any], scores: list[Tensor], answer: Any, y: Tensor, ignore: int | None) -> _Rows:
    """The labelled rows of a batch, from the exits' answers and scores, the model's answer and the labels."""
    samples = torch.arange(y.shape[0])
    if y.dim() > 1:
        answers, scores, y, samples = _at_positions(answers, scores, answer, y)
    logits, labels = _checked(answers, y, ignore)
    if any(score.shape != (len(labels), 1) for score in scores):
        raise StructureError(f"calibration needs scores of shape (B, 1), one per sample, got {tuple(scores[0].shape)}")
    labelled = labels != ignore if ignore is not None else torch.ones_like(labels, dtype=torch.bool)
    together = torch.cat(scores, 1).cpu()
    return _Rows(logits[labelled], labels[labelled], together[labelled], samples[labelled])


def _at_positions(
    answers: list[Any], scores: list[Tensor], answer: Any, y: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Evenly spaced positions of (B, C, h, w) as rows: answers (R, C), scores (R, 1), labels (R,), samples (R,)."""
    if not all(isinstance(a, Tensor) and a.dim() == 4 for a in answers):
        raise DataError(f"labels of shape {tuple(y.shape)} are of pixels; expected exits that answer (B, C, h, w)")
    if not isinstance(answer, Tensor) or y.shape != answer.shape[:1] + answer.shape[2:]:
        raise DataError(
            f"labels of shape {tuple(y.shape)} for answers of shape {tuple(answer.shape)}; give one label per pixel, "
            f"(B, H, W)"
        )
    batch, _, height, width = answers[0].shape
    count = min(POSITIONS, height * width)
    places = torch.linspace(0, height * width - 1, count, dtype=torch.float64).round().long()
    centres = functional.interpolate(y[:, None].double(), size=(height, width), mode="nearest-exact").to(y.dtype)
    return (
        [a.flatten(2)[..., places.to(a.device)].transpose(1, 2).flatten(0, 1) for a in answers],
        [score.reshape(batch, -1, 1)[:, places.to(score.device)].flatten(0, 1) for score in scores],
        centres.flatten(1)[:, places.to(y.device)].flatten(),
        torch.arange(batch).repeat_interleave(count),
    )


def _checked(answers: list[Any], y: Tensor, ignore: int | None) -> tuple[Tensor, Tensor]:
    """Logits (R, K, C) float32 and labels (R,) int64, both on the CPU."""
    if not all(isinstance(a, Tensor) and a.dim() == 2 for a in answers):
        raise DataError("calibration needs exits that answer logits of shape (samples, classes)")
    logits = torch.stack(answers, 1).float().cpu()
    labels = y.cpu()
    classes = logits.shape[-1]
    if labels.dim() != 1 or labels.shape[0] != logits.shape[0] or labels.is_floating_point():
        raise DataError(f"labels must be ({logits.shape[0]},) class indices, got shape {tuple(y.shape)} and {y.dtype}")
    labels = labels.long()
    known = labels[labels != ignore] if ignore is not None else labels
    if len(known) and (known.min() < 0 or known.max() >= classes):
        found = f"{known.min().item()} to {known.max().item()}"
        raise DataError(f"labels must be from 0 to {classes - 1} for a model of {classes} classes, got {found}")
    if not logits.isfinite().all():
        raise DataError("the model answers NaN or infinite logits on the held-out data; check the data and the weights")
    return logits, labels
