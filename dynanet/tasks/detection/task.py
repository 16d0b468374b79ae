"""Object detection as a task."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import record
from dynanet.core.errors import ConfigError, DataError
from dynanet.core.objective import Objective
from dynanet.data.detection import unpadded
from dynanet.data.voc import Boxes
from dynanet.tasks.detection.decoding import Detections, decode
from dynanet.tasks.detection.loss import DetectionLoss
from dynanet.tasks.detection.precision import average_precision
from dynanet.tasks.task import Overlay, Score, Task, TrainingOptions, spent_macs, with_layer_terms

_DRAWN = 0.3  # the least score of a box that is drawn


@dataclass(frozen=True)
class Detection(Task):
    """Boxes around objects, scored by COCO's mean average precision.

    Labels of a batch are boxes (B, M, 5), as in `data.detection`.

    Attributes:
        classes: their names.
    """

    classes: tuple[str, ...]

    monitor: ClassVar[str] = "val/loss"
    lower_is_better: ClassVar[bool] = True
    tabulated: ClassVar[bool] = False

    def objective(self, model: nn.Module, options: TrainingOptions) -> Objective:
        """The detection loss, and the terms of the model's layers."""
        if options.exit_weights or options.distill or options.label_smoothing:
            raise ConfigError(
                "recipe.exit_weights, distill and label_smoothing are for classification; leave them out of detection"
            )
        return with_layer_terms(DetectionLoss(), model, options)

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[tuple[Any, Tensor]], cost: CostModel) -> Score:
        """Mean average precision of a model in eval mode.

        Args:
            model: (B, C, H, W) to the answer of a detector of `zoo.detector`.
            batches: (x, y), y (B, M, 5).
            cost: of this model.

        Raises:
            DataError: no box in all of the data but difficult ones, or a label outside the classes.
            MissingExtraError: pycocotools is not installed.
        """
        found: list[Detections] = []
        wanted: list[Boxes] = []
        spent = 0.0
        for x, y in batches:
            with record(model) as trace:
                found += decode(model(x), (x.shape[2], x.shape[3]))
            wanted += unpadded(y)
            spent += float(spent_macs(trace, cost, len(y)).sum())
        if all(bool(boxes.difficult.all()) for boxes in wanted):
            raise DataError(f"no box in any of {len(wanted)} images that is not difficult: nothing to score")
        precision = average_precision(found, wanted, self.classes)
        figures = {"map": precision.mean, "map_50": precision.at_50, "map_75": precision.at_75}
        return Score(figures, spent / len(found), {"map": list(precision.classes.values())})

    def overlay(self, answer: Tensor, y: Tensor, classes: Sequence[str], size: tuple[int, int]) -> Overlay:
        """Boxes found, of a score worth showing, and true boxes."""
        (found,) = decode(answer, size, least=_DRAWN)
        (wanted,) = unpadded(y)
        return Overlay(
            found=list(zip(*(field.tolist() for field in found), strict=True)),
            truth=list(zip(wanted.boxes.tolist(), wanted.labels.tolist(), strict=True)),
        )

    def true_boxes(self, y: Tensor) -> list[Tensor]:
        """The boxes of every image."""
        return [each.boxes for each in unpadded(y)]
