"""A Table is what one pass over held-out data says about every exit of a model. All choices are made from it."""

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
from dynanet.core.dynamic import Dynamic, everything, forced, layers, record
from dynanet.core.errors import DataError, StructureError
from dynanet.core.files import write_atomically
from dynanet.core.halt import Halt

POSITIONS = 500  # of an image that get a row; neighbours say much the same


@dataclass(frozen=True, eq=False)
class ExitTable:
    """N rows, K exits. Nothing here knows torch.

    A row is a sample; where positions of an image leave one by one, a position (see `groups`).

    Attributes:
        scores: (N, K - 1) float64, how sure the model was after every step at which a row may leave. The last step
            asks nobody, so it has no score.
        answers: (N, K) int64, the class every exit gave.
        correct: (N, K) bool.
        macs: (K,) or (N, K) float64, multiply-accumulates of a sample that leaves at exit k, everything before
            included; (N, K) where layers inside the steps decide too. With groups: of a sample all of whose rows do.
        ms: (K,) float64, milliseconds per sample that leaves at exit k. None: not measured.
        worst: (K,) float64, `macs` of the dearest path to every exit; what a hard cap is held against. None: the
            largest of `macs`.
        labels: (N,) int64, the true classes, for reports. None: not kept.
        logits: (N, K, C) float32. None: not kept.
        groups: (N,) int64, the sample that a row is a position of. None: rows are samples.

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
    groups: np.ndarray | None = None

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
            "labels": [(n,)], "groups": [(n,)],
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
        """N, the rows."""
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
    def most_expensive(self) -> np.ndarray:
        """(K,) MACs that no sample exceeds if it leaves at exit k at the latest."""
        return np.maximum.accumulate(self.worst if self.worst is not None else np.atleast_2d(self.macs).max(0))

    def take(self, rows: np.ndarray) -> "ExitTable":
        """The table of some of its samples, (n,) indices or a mask."""
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
        """Write an .npz file, whole or not at all."""
        arrays = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

        def write(file: BinaryIO) -> None:
            np.savez_compressed(file, **arrays)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ExitTable":
        """Read what `save` wrote.

        Raises:
            DataError: not such a file, or a damaged one.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files
            said = (
                f"{os.fspath(path)} cannot be read as a calibration table ({error}); make one with calibrate.calibrate"
            )
            raise DataError(said) from error
        names = {f.name for f in fields(cls)}
        needed = {"scores", "answers", "correct", "macs"}
        if not needed <= set(arrays) <= names:
            raise DataError(f"{os.fspath(path)} holds {sorted(arrays)}; a table has at least {sorted(needed)}")
        return cls(**arrays)


_DTYPES: dict[str, Any] = {
    "scores": np.float64, "answers": np.int64, "correct": np.bool_, "macs": np.float64, "ms": np.float64,
    "worst": np.float64, "labels": np.int64, "logits": np.float32, "groups": np.int64,
}  # fmt: skip


def halt_of(model: nn.Module) -> tuple[str, Dynamic]:
    """The layer whose exits are chosen, and its name: the outermost Halt, which no other decision may guard; or a layer
    that is none, because its rows stay, and has thresholds (`PixelCascade`).

    Raises:
        StructureError: there is none, there are several side by side, or it runs only if another layer says so.
    """
    found = {n: each for n, each in layers(model).items() if isinstance(each, Halt) or thresholds_of(each) is not None}
    outer = {n: h for n, h in found.items() if not any(n != o and (o == "" or n.startswith(o + ".")) for o in found)}
    if len(outer) != 1:
        what = f"has {sorted(outer)} side by side" if outer else "has no layer that halts"
        raise StructureError(f"calibration needs one layer that halts (EarlyExit, say); {type(model).__name__} {what}")
    return next(iter(outer.items()))


def thresholds_of(layer: nn.Module) -> Tensor | None:
    """The buffer through which a layer is calibrated; None without."""
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
    """One pass over held-out data, every step run for every sample.

    Thresholds fitted on training data, or through augmentation, are thresholds for other scores: give data that the
    model has not seen, as it will come.

    Where positions leave one by one, rows are positions, labelled as the pixel in their middle: evenly spaced ones, up
    to `POSITIONS` of an image. Positions are taken to be independent: that a later stage sees less around it once
    others have left is not in the table, so measure what thresholds reach on whole images.

    Args:
        model: with one Halt that answers logits (B, C), or a layer with thresholds that answers (B, C, h, w). Its modes
            and limit are left as they were.
        loader: batches (x, y); y is (B,) class indices, or (B, H, W) of every pixel.
        cost: of this model.
        keep_logits: keep the logits of all exits too.
        ignore: the label of rows that have none; they are left out.

    Raises:
        StructureError: the model has no Halt, several, or one of a single step.
        DataError: no (labelled) samples; labels that are no class indices, or of another size than the answers; answers
            that are no logits or not finite.
    """
    name, halt = halt_of(model)
    if exits_of(halt) < 2:
        raise StructureError("calibration needs a model with at least two exits; this one has a single step")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches: list[dict[str, np.ndarray]] = []
    worst, samples = None, 0
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
                answer = model(x)
            calls = [call for call in trace.calls if call.name == name]
            if any(call.around.keys() - {name} for call in calls):
                raise StructureError(f"the layer {name!r} runs only where another says so; its exits cannot be chosen")
            rows = _rows(trace.answers[name], [call.decision.score for call in calls], answer, y, ignore)
            answers = rows.logits.argmax(-1)
            batches.append({
                "scores": rows.scores.double().numpy(),
                "answers": answers.numpy(),
                "correct": (answers == rows.labels[:, None]).numpy(),
                "macs": cost.steps(trace, name).cpu()[rows.samples].numpy(),
                "labels": rows.labels.numpy(),
            } | ({"logits": rows.logits.numpy()} if keep_logits else {})
              | ({"groups": (samples + rows.samples).numpy()} if y.dim() > 1 else {}))  # fmt: skip
            samples += y.shape[0]
    if not batches:
        raise DataError("the held-out data has no samples; give a loader of batches (x, y)")
    if not any(len(batch["labels"]) for batch in batches):
        raise DataError(f"all labels of the held-out data are {ignore}, to be ignored; give data with labels")
    whole = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    if (whole["macs"] == whole["macs"][:1]).all():
        whole["macs"] = whole["macs"][0]
    return ExitTable(worst=worst, **whole)


@contextmanager
def _every_step(model: nn.Module, halt: Dynamic) -> Iterator[None]:
    """Eval mode, and the halt (not the layers inside it) lets every row go on to the end."""
    modes = {module: module.training for module in model.modules()}
    limit, force = halt.limit if isinstance(halt, Halt) else None, halt.force
    model.eval()
    halt.force = everything
    if isinstance(halt, Halt):
        halt.limit = None
    try:
        yield
    finally:
        halt.force = force
        if isinstance(halt, Halt):
            halt.limit = limit
        for module, mode in modes.items():
            module.training = mode


class _Rows(NamedTuple):
    """What a batch says of R rows: logits (R, K, C) float32, labels (R,) int64, scores (R, K - 1), and the sample (R,)
    of the batch that each is of. On the CPU.
    """

    logits: Tensor
    labels: Tensor
    scores: Tensor
    samples: Tensor


def _rows(answers: list[Any], scores: list[Tensor], answer: Any, y: Tensor, ignore: int | None) -> _Rows:
    """Of the exits' answers and scores, the model's answer and the labels."""
    samples = torch.arange(y.shape[0])
    if y.dim() > 1:
        answers, scores, y, samples = _at_positions(answers, scores, answer, y)
    logits, labels = _checked(answers, y, ignore)
    if any(score.shape != (len(labels), 1) for score in scores):
        raise StructureError(f"scores of {tuple(scores[0].shape)}; calibration needs (B, 1): one per sample")
    labelled = labels != ignore if ignore is not None else torch.ones_like(labels, dtype=torch.bool)
    together = torch.cat(scores, 1).cpu()
    return _Rows(logits[labelled], labels[labelled], together[labelled], samples[labelled])


def _at_positions(
    answers: list[Any], scores: list[Tensor], answer: Any, y: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Evenly spaced positions of (B, C, h, w) as rows: answers (R, C), scores (R, 1), labels (R,), samples (R,)."""
    if not all(isinstance(a, Tensor) and a.dim() == 4 for a in answers):
        raise DataError(f"labels of shape {tuple(y.shape)} are of pixels, but the exits do not answer (B, C, h, w)")
    if not isinstance(answer, Tensor) or y.shape != answer.shape[:1] + answer.shape[2:]:
        raise DataError(
            f"labels of shape {tuple(y.shape)} for answers of shape {tuple(answer.shape)}; give one label per pixel, "
            f"(B, H, W)"
        )
    batch, _, height, width = answers[0].shape
    count = min(POSITIONS, height * width)
    places = torch.linspace(0, height * width - 1, count, dtype=torch.float64).round().long()
    middles = functional.interpolate(y[:, None].double(), size=(height, width), mode="nearest-exact").to(y.dtype)
    return (
        [a.flatten(2)[..., places.to(a.device)].transpose(1, 2).flatten(0, 1) for a in answers],
        [score.reshape(batch, -1, 1)[:, places.to(score.device)].flatten(0, 1) for score in scores],
        middles.flatten(1)[:, places.to(y.device)].flatten(),
        torch.arange(batch).repeat_interleave(count),
    )


def _checked(answers: list[Any], y: Tensor, ignore: int | None) -> tuple[Tensor, Tensor]:
    """Logits (R, K, C) float32 and labels (R,) int64, both on the CPU."""
    if not all(isinstance(a, Tensor) and a.dim() == 2 for a in answers):
        raise DataError("calibration needs exits that answer logits (samples, classes); these answer something else")
    logits, labels = torch.stack(answers, 1).float().cpu(), y.cpu()
    classes = logits.shape[-1]
    if labels.dim() != 1 or labels.shape[0] != logits.shape[0] or labels.is_floating_point():
        raise DataError(f"labels of shape {tuple(y.shape)} and {y.dtype}; give ({logits.shape[0]},) class indices")
    labels = labels.long()
    told = labels[labels != ignore] if ignore is not None else labels
    if len(told) and (told.min() < 0 or told.max() >= classes):
        seen = f"{told.min().item()} to {told.max().item()}"
        raise DataError(f"labels from {seen} for a model of {classes} classes; give indices from 0 to {classes - 1}")
    if not logits.isfinite().all():
        raise DataError("the model answers NaN or infinite logits on the held-out data; check the data and the weights")
    return logits, labels
