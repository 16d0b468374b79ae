"""Segmentation: one class for every pixel."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import Dynamic, record
from dynanet.core.errors import ConfigError, DataError
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.data.camvid import check_labels
from dynanet.data.pixel_labels import check_pixel_labels, pixel_cross_entropy
from dynanet.tasks.task import Overlay, Score, Task, TrainingOptions, spent_macs, with_layer_terms


@dataclass(frozen=True)
class Segmentation(Task):
    """A class for every pixel: mIoU and pixel accuracy over all pixels of all images, void ones left out.

    Attributes:
        classes: how many.
        void: the label of pixels without a class.
    """

    figures: ClassVar[tuple[str, ...]] = ("miou", "pixel_accuracy")
    classes: int
    void: int

    @property
    def ignore(self) -> int:
        """The label of void pixels."""
        return self.void

    def objective(self, model: nn.Module, options: TrainingOptions) -> Objective:
        """The loss over pixels that the model brings, or the cross-entropy over labelled pixels."""
        if options.distill or options.label_smoothing:
            raise ConfigError("recipe.distill and recipe.label_smoothing are for classification; leave them at 0")
        own = model.pixel_loss(self.void, options.exit_weights) if isinstance(model, Dynamic) else None
        return with_layer_terms(own if own is not None else PixelCrossEntropy(self.void), model, options)

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[tuple[Any, Tensor]], cost: CostModel) -> Score:
        """Mean intersection over union and pixel accuracy of a model in eval mode.

        Args:
            model: (B, C, H, W) to logits (B, classes, H, W).
            batches: (x, y), y (B, H, W).
            cost: of this model.

        Raises:
            DataError: no labelled pixel, labels of another size than the answers, or labels that are neither a class
                nor void.
        """
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex  # seconds to import

        jaccard = MulticlassJaccardIndex(self.classes, average=None, ignore_index=self.void)
        accuracy = MulticlassAccuracy(self.classes, average="micro", ignore_index=self.void)
        spent = 0.0
        samples = labelled = 0
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
            spent += float(spent_macs(trace, cost, len(y)).sum())
            samples += len(y)
            labelled += int((y != self.void).sum())
        if not labelled:
            raise DataError(f"all pixels of {samples} images are void ({self.void}); give images with labels")
        confusion = jaccard.confmat.double()
        met = (confusion.sum(0) + confusion.sum(1)) > 0
        by_class = torch.where(met, jaccard.compute().double(), torch.nan)
        figures = {"miou": float(by_class[met].mean()), "pixel_accuracy": float(accuracy.compute())}
        return Score(figures, spent / samples, {"iou": by_class.tolist()})

    def overlay(self, answer: Tensor, y: Tensor, classes: Sequence[str], size: tuple[int, int]) -> Overlay:
        """The predicted and the true class of every pixel."""
        return Overlay(labels=answer[0].argmax(0).numpy(), known=torch.where(y[0] == self.void, -1, y[0]).numpy())


@dataclass(frozen=True)
class PixelCrossEntropy(Objective):
    """The mean cross-entropy over labelled pixels; 0 where there are none.

    Args:
        ignore: the label of void pixels.
    """

    ignore: int

    def __call__(self, answer: Tensor, y: Any, trace: Trace) -> Tensor:
        """Return the loss of logits (B, C, H, W) and labels (B, H, W).

        Raises:
            ConfigError: labels of another size.
            DataError: a label that is neither a class nor void.
        """
        check_pixel_labels(y, answer, self.ignore)
        return pixel_cross_entropy(answer, y, self.ignore)
