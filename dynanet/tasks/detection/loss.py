"""The loss of an anchor-free detector, and the assignment of boxes to positions."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from dynanet.core.errors import ConfigError, DataError, InputError, check_sizes
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.data.voc import reversed_corners
from dynanet.tasks.detection.boxes import area, from_sides, generalized_overlap, places, sides


@dataclass(frozen=True)
class DetectionLoss(Objective):
    """Focal loss of the classes, GIoU loss of the boxes and cross-entropy of the centreness, per assigned position.

    FCOS (Tian et al. 2019, arXiv:1904.01355, equation 2): boxes are weighted with their true centreness. Focal loss:
    Lin et al. 2017, arXiv:1708.02002; GIoU: Rezatofighi et al. 2019, arXiv:1902.09630. A batch without boxes has the
    loss of the classes only.

    Args:
        stride: of the feature map.
        alpha: weight of positive targets; negative ones have 1 - alpha.
        gamma: exponent by which well classified positions count less.
        reach: a position is assigned a box whose middle is nearer than this many strides, across and down.

    Raises:
        ConfigError: a value out of range.
    """

    stride: int = 8
    alpha: float = field(default=0.25, kw_only=True)
    gamma: float = field(default=2.0, kw_only=True)
    reach: float = field(default=1.5, kw_only=True)

    def __post_init__(self) -> None:
        check_sizes(stride=self.stride)
        if not 0 <= self.alpha <= 1 or self.gamma < 0 or self.reach <= 0:
            raise ConfigError(
                f"alpha is {self.alpha}, gamma {self.gamma} and reach {self.reach}; expected alpha from 0 to 1, gamma "
                f"of at least 0 and a positive reach"
            )

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Return the loss of answers (B, classes + 5, h, w).

        Args:
            answer: class logits, logarithms of the four sides in strides, a centreness logit.
            y: boxes (B, M, 5): label, left, top, right, bottom in pixels; negative labels are not learned from.
            trace: not used.

        Raises:
            DataError: boxes of another shape, or a label outside the classes.
            InputError: a box whose right is left of its left, or its bottom above its top.
        """
        height, width = answer.shape[2:]
        classes = answer.shape[1] - 5
        _check(y, classes, answer.shape[0])
        answer = answer.float().flatten(2).transpose(1, 2)  # (B, P, classes + 5); half precision ends here
        y = y.to(answer)
        at = places(height, width, self.stride, answer)
        label, boxes = assign(y, at, self.stride, self.reach)
        wanted = functional.one_hot(label + 1, classes + 1)[..., 1:].to(answer)
        answers = label >= 0
        count = answers.sum().clamp(min=1)
        found = from_sides(at, sides(answer[..., -5:-1], self.stride))[answers]
        central = centreness(at.expand(*boxes.shape[:2], 2)[answers], boxes[answers])
        missed = central * (1 - generalized_overlap(found, boxes[answers]))
        middle = functional.binary_cross_entropy_with_logits(answer[..., -1][answers], central, reduction="sum")
        return (
            self._focal(answer[..., :classes], wanted).sum() / count
            + missed.sum() / central.sum().clamp(min=1e-6)
            + middle / count
        )

    def _focal(self, logits: Tensor, wanted: Tensor) -> Tensor:
        loss = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        p = logits.sigmoid()
        wrong = p + wanted - 2 * p * wanted  # 1 - p of positive targets, p of negative ones
        return (self.alpha * wanted + (1 - self.alpha) * (1 - wanted)) * wrong**self.gamma * loss


def assign(y: Tensor, places_P2: Tensor, stride: int, reach: float) -> tuple[Tensor, Tensor]:
    """Assign to every position the smallest box around it whose middle is near.

    The position in whose cell the middle of a box lies is assigned the box even if it lies outside: without this rule
    boxes smaller than a cell would be assigned to none.

    Args:
        y: (B, M, 5) as in `DetectionLoss`.
        places_P2: the positions' middles.
        stride: of the feature map.
        reach: in strides.

    Returns:
        label (B, P) int64, -1 where no box is assigned; boxes (B, P, 4), zeros there.
    """
    batch, most, _ = y.shape
    if not most:
        nothing = torch.full((batch, len(places_P2)), -1, device=y.device)
        return nothing, y.new_zeros(batch, len(places_P2), 4)
    boxes, real = y[:, None, :, 1:], y[:, None, :, 0] >= 0  # (B, 1, M, ...)
    at = places_P2[None, :, None]
    inside = ((at > boxes[..., :2]) & (at < boxes[..., 2:])).all(-1)
    away = (at - (boxes[..., :2] + boxes[..., 2:]) / 2).abs().amax(-1)
    fits = real & ((inside & (away < reach * stride)) | (away <= stride / 2))
    size = area(boxes).expand(fits.shape).masked_fill(~fits, torch.inf)
    least, which = size.min(-1)  # (B, P)
    chosen = y.gather(1, which[..., None].expand(-1, -1, 5))
    there = least.isfinite()
    return torch.where(there, chosen[..., 0].long(), -1), chosen[..., 1:] * there[..., None]


def centreness(places: Tensor, boxes: Tensor) -> Tensor:
    """Return 1 in the middle of a box, 0 at its edge and outside: (..., 2) and (..., 4) to (...) (FCOS, equation 3)."""
    before, after = (places - boxes[..., :2]).clamp(min=0), (boxes[..., 2:] - places).clamp(min=0)
    ratio = torch.minimum(before, after) / torch.maximum(before, after).clamp(min=torch.finfo(boxes.dtype).tiny)
    return ratio.prod(-1).sqrt()


def _check(y: Tensor, classes: int, batch: int) -> None:
    if y.dim() != 3 or y.shape[0] != batch or y.shape[2] != 5:
        raise DataError(
            f"boxes of shape {tuple(y.shape)} came for {batch} images; expected ({batch}, M, 5): label, left, top, "
            f"right, bottom"
        )
    if y.numel() and int(y[..., 0].max()) >= classes:
        raise DataError(
            f"a box has the label {int(y[..., 0].max())} and the detector has {classes} classes; expected labels from "
            f"0 to {classes - 1} (-1 for padding)"
        )
    backwards = reversed_corners(y[..., 1:]) & (y[..., 0] >= 0)
    if bool(backwards.any()):
        image, box = backwards.nonzero()[0].tolist()
        raise InputError(
            f"box {box} of image {image} of the batch is {y[image, box, 1:].tolist()}; expected left, top, right, "
            f"bottom in this order: right at least left, bottom at least top"
        )
