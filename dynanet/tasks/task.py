"""What a network is asked for: how it is trained for that, and how whole answers are scored."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import layers, record
from dynanet.core.errors import ConfigError, DataError
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.data.camvid import check_labels
from dynanet.data.detection import unpadded
from dynanet.data.voc import Boxes
from dynanet.gates.confidence import Confidence
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.early_stop import EarlyStop
from dynanet.mechanisms.layer_skip import BranchSkip, LayerSkip
from dynanet.mechanisms.pixel_cascade import PixelCascade, PixelCascadeLoss, roaming_thresholds
from dynanet.mechanisms.position_halting import PositionHalting, PositionPonderCost
from dynanet.tasks.detection.decoding import Detections, decode
from dynanet.tasks.detection.loss import DetectionLoss
from dynanet.tasks.detection.precision import average_precision
from dynanet.train.objectives import CrossEntropy, MultiExit, TargetRate
from dynanet.train.schedules import Setting

_RATE_WEIGHT = 4.0  # of the pull to a rate, beside a loss of about 1


@dataclass(frozen=True)
class TrainingOptions:
    """What an experiment may ask of an objective.

    Attributes:
        exit_weights: of the exits' losses; None: equal.
        distill: how much the last exit teaches the others.
        label_smoothing: share of the target spread over all classes.
        ponder: weight of the ponder cost of halting positions.
        rate: share of the images for which every layer that can be left out is to run; None: whatever the loss likes.
    """

    exit_weights: Sequence[float] | None = None
    distill: float = 0.0
    label_smoothing: float = 0.0
    ponder: float = 0.0
    rate: float | None = None


@dataclass(frozen=True)
class Score:
    """How good answers are, and what they cost.

    Attributes:
        figures: by name, the one to lead with first; shares, the higher the better.
        macs: per sample, really spent.
        by_class: by name of the figure, (C,) of every class; NaN where there is none.
    """

    figures: dict[str, float]
    macs: float
    by_class: dict[str, list[float]] = field(default_factory=dict)


class Task(ABC):
    """A task that a network of `zoo` can be trained, calibrated and measured for.

    Attributes:
        monitor: the metric of the best epoch.
        lower_is_better: it is a loss.
        tabulated: its answers are scored from a table of exits, on which thresholds are calibrated; otherwise by
            `score`, of the model as it is.
        figures: what `score` tells of whole answers, where the rows of the table are parts of them (pixels).
        ignore: the label of rows that have none.
    """

    monitor: ClassVar[str] = "val/accuracy"
    lower_is_better: ClassVar[bool] = False
    tabulated: ClassVar[bool] = True
    figures: ClassVar[tuple[str, ...]] = ()

    @property
    def ignore(self) -> int | None:
        """See above."""
        return None

    @abstractmethod
    def objective(self, model: nn.Module, asked: TrainingOptions) -> Objective:
        """What training minimises.

        Raises:
            ConfigError: something was asked that this task or model has no use for.
        """

    def schedules(self, model: nn.Module) -> list[Setting]:
        """What changes while it trains."""
        return []

    def finish(self, model: nn.Module) -> None:  # noqa: B027  (most need nothing)
        """Make a trained model one that never exits early, to be calibrated."""

    def score(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], cost: CostModel) -> "Score":
        """How good the answers of a model in eval mode are, where they are not tabulated."""
        raise ConfigError(f"{type(self).__name__} is scored from its table of exits; calibrate the run first")


class Classification(Task):
    """A class for every sample: scored from the table of exits; by `score` where there are none."""

    def objective(self, model: nn.Module, asked: TrainingOptions) -> Objective:
        """Cross-entropy, of every exit if there are several."""
        if not isinstance(model, EarlyExit | EarlyStop) or (isinstance(model, EarlyStop) and model.policy is not None):
            return _rated(CrossEntropy(asked.label_smoothing), model, asked.rate)
        weights = asked.exit_weights if asked.exit_weights is not None else [1 / model.steps] * model.steps
        exits = MultiExit(weights, distill=asked.distill, label_smoothing=asked.label_smoothing)
        return _rated(exits, model, asked.rate)

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[tuple[Any, Tensor]], cost: CostModel) -> Score:
        """Of a model without exits, in eval mode.

        Args:
            model: to logits (B, classes).
            batches: (x, y), y (B,).
            cost: of this model.

        Raises:
            DataError: no samples, or a label that is no class.
        """
        spent, counted = 0.0, []
        for x, y in batches:
            with record(model) as trace:
                answer = model(x)
            classes = answer.shape[1]
            if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
                raise DataError(
                    f"labels from {int(y.min())} to {int(y.max())} for a model of {classes} classes; give indices from "
                    f"0 to {classes - 1}"
                )
            right = y[answer.argmax(1) == y]
            counted.append(torch.stack([torch.bincount(each, minlength=classes) for each in (right, y)]))
            spent += float(cost.spent(trace).sum()) if trace.calls else cost.full * len(y)
        if not sum(int(each[1].sum()) for each in counted):
            raise DataError("no samples to score; give batches (x, y)")
        right, met = torch.stack(counted).sum(0).double()
        figures = {"accuracy": float(right.sum() / met.sum())}
        return Score(figures, spent / float(met.sum()), {"accuracy": (right / met).tolist()})


@dataclass(frozen=True)
class Segmentation(Task):
    """A class for every pixel: mIoU and pixel accuracy over all pixels of all images, void ones left out.

    Attributes:
        classes: how many.
        void: the label of pixels that belong to none.
    """

    figures: ClassVar[tuple[str, ...]] = ("miou", "pixel_accuracy")
    classes: int
    void: int

    @property
    def ignore(self) -> int:
        """Void."""
        return self.void

    def objective(self, model: nn.Module, asked: TrainingOptions) -> Objective:
        """Cross-entropy over labelled pixels; of a cascade, every stage's over the pixels that reached it."""
        if asked.distill or asked.label_smoothing:
            raise ConfigError("recipe.distill and recipe.label_smoothing are for classification; leave them at 0")
        if isinstance(model, PixelCascade):
            return _rated(PixelCascadeLoss(self.void, weights=asked.exit_weights), model, asked.rate)
        return _rated(PixelCrossEntropy(self.void), model, asked.rate)

    def schedules(self, model: nn.Module) -> list[Setting]:
        """Of a cascade the thresholds, in the second half of training."""
        return [roaming_thresholds(each) for each in layers(model).values() if isinstance(each, PixelCascade)]

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """No thresholds."""
        for each in layers(model).values():
            if isinstance(each, PixelCascade):
                each.thresholds.fill_(torch.inf)

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], cost: CostModel) -> Score:
        """Of a model in eval mode, at its thresholds.

        Args:
            model: (B, C, H, W) to logits (B, classes, H, W).
            batches: (x, y), y (B, H, W).
            cost: of this model.

        Raises:
            DataError: no labelled pixel in all of the data, labels of another size than the answers, or ones that are
                neither a class nor void.
        """
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex  # seconds to import

        given = {"num_classes": self.classes, "ignore_index": self.void}
        jaccard = MulticlassJaccardIndex(average=None, **given)
        accuracy = MulticlassAccuracy(average="micro", **given)
        spent = samples = labelled = 0.0
        for x, y in batches:
            with record(model) as trace:
                answer = model(x)
            if answer.shape[:1] + answer.shape[2:] != y.shape:
                raise DataError(
                    f"labels of shape {tuple(y.shape)} for answers of shape {tuple(answer.shape)}; give a label per "
                    f"pixel"
                )
            check_labels(y, self.classes, self.void, "a batch of labels")
            found = answer.argmax(1)
            jaccard.update(found, y)
            accuracy.update(found, y)
            spent += float(cost.spent(trace).sum()) if trace.calls else cost.full * len(y)
            samples, labelled = samples + len(y), labelled + int((y != self.void).sum())
        if not labelled:
            raise DataError(f"all pixels of {samples:.0f} images are void ({self.void}); give images with labels")
        confusion = jaccard.confmat.double()
        met = (confusion.sum(0) + confusion.sum(1)) > 0
        by_class = torch.where(met, jaccard.compute().double(), torch.nan)
        figures = {"miou": float(by_class[met].mean()), "pixel_accuracy": float(accuracy.compute())}
        return Score(figures, spent / samples, {"iou": by_class.tolist()})


@dataclass(frozen=True)
class Detection(Task):
    """Boxes around things: COCO's mean average precision. Labels of a batch are boxes (B, M, 5), as in
    `data.detection`.

    Attributes:
        classes: their names.
    """

    classes: tuple[str, ...]

    monitor: ClassVar[str] = "val/loss"
    lower_is_better: ClassVar[bool] = True
    tabulated: ClassVar[bool] = False

    def objective(self, model: nn.Module, asked: TrainingOptions) -> Objective:
        """The detection loss; with halting positions their ponder cost too, weighted with `asked.ponder`, and with
        layers that are skipped what draws each to run for `asked.rate` of the images.
        """
        if asked.exit_weights or asked.distill or asked.label_smoothing:
            raise ConfigError(
                "recipe.exit_weights, distill and label_smoothing are for classification; leave them out of detection"
            )
        halts = any(isinstance(layer, PositionHalting) for layer in layers(model).values())
        if asked.ponder and not halts:
            raise ConfigError(f"recipe.ponder is {asked.ponder:g}, but no position of this model halts; leave it at 0")
        objective = DetectionLoss() + asked.ponder * PositionPonderCost() if halts else DetectionLoss()
        return _rated(objective, model, asked.rate)

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], cost: CostModel) -> Score:
        """Of a model in eval mode.

        Args:
            model: (B, C, H, W) to the answer of a detector of `zoo.detector`.
            batches: (x, y), y (B, M, 5).
            cost: of this model.

        Raises:
            DataError: no box in all of the data, or a label that is no class.
            MissingExtraError: pycocotools is not installed.
        """
        found: list[Detections] = []
        wanted: list[Boxes] = []
        spent = 0.0
        for x, y in batches:
            with record(model) as trace:
                found += decode(model(x), (x.shape[2], x.shape[3]))
            wanted += unpadded(y)
            spent += float(cost.spent(trace).sum()) if trace.calls else cost.full * len(y)
        if not any(len(boxes.labels) for boxes in wanted):
            raise DataError(f"no box in any of {len(wanted)} images: nothing to score")
        precision = average_precision(found, wanted, self.classes)
        figures = {"map": precision.mean, "map_50": precision.at_50, "map_75": precision.at_75}
        return Score(figures, spent / len(found), {"map": list(precision.classes.values())})


def _rated(objective: Objective, model: nn.Module, rate: float | None) -> Objective:
    """With what draws every layer that is skipped to run for this share of the images."""
    if rate is None:
        return objective
    skips = [name for name, layer in layers(model).items() if isinstance(layer, BranchSkip | LayerSkip)]
    if not skips:
        raise ConfigError(f"recipe.rate is {rate:g}, but no layer of this model is skipped; leave it out")
    return objective + _RATE_WEIGHT * TargetRate(dict.fromkeys(skips, rate))


def with_random_exits(model: nn.Module, share: np.ndarray) -> tuple[nn.Module, np.ndarray]:
    """A copy of a cascade of pixels that leave by lot, and its thresholds: what confidence is worth is the difference.

    Args:
        model: one PixelCascade, or a model with one.
        share: (K,) of the positions that leave at every exit.
    """
    copied = copy.deepcopy(model)
    for each in layers(copied).values():
        if isinstance(each, PixelCascade):
            each.confidence = _Lots()
    there = 1 - share.cumsum() + share  # before every exit
    leaves = np.divide(share, there, out=np.ones_like(share), where=there > 1e-9)[:-1]
    return copied, np.where(leaves > 0, 1 - leaves, np.inf)


class _Lots(Confidence):
    """A number between 0 and 1, whatever the answer."""

    def forward(self, logits: Tensor, memory: Any = None) -> Tensor:
        return torch.rand_like(logits[..., :1])


class PixelCrossEntropy(Objective):
    """The mean cross-entropy over labelled pixels; 0 where there are none.

    Args:
        ignore: the label of void pixels.
    """

    def __init__(self, ignore: int) -> None:
        self.ignore = ignore

    def __call__(self, answer: Tensor, y: Any, trace: Trace) -> Tensor:
        """Logits (B, C, H, W) and labels (B, H, W).

        Raises:
            ConfigError: labels of another size.
            DataError: a label that is neither a class nor void.
        """
        if answer.shape[:1] + answer.shape[2:] != y.shape:
            raise ConfigError(
                f"labels of shape {tuple(y.shape)} came for an answer of shape {tuple(answer.shape)}; give one label "
                f"per pixel, (B, H, W)"
            )
        check_labels(y, answer.shape[1], self.ignore, "a batch of labels")
        total = functional.cross_entropy(answer, y, ignore_index=self.ignore, reduction="sum")
        return total / (y != self.ignore).sum().clamp(min=1)

    def __repr__(self) -> str:
        return f"PixelCrossEntropy({self.ignore})"
