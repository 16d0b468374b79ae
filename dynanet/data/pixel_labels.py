"""Labels of pixels: checked, and learned from where they are not void."""

from torch import Tensor
from torch.nn import functional

from dynanet.core.errors import ConfigError
from dynanet.data.camvid import check_labels


def check_pixel_labels(labels: Tensor, answer: Tensor, void: int) -> None:
    """Check that there is one valid label per pixel of an answer.

    Args:
        labels: (B, H, W), whole numbers.
        answer: logits (B, classes, H, W).
        void: the label of pixels without a class.

    Raises:
        ConfigError: labels of another size.
        DataError: a label that is neither a class nor void.
    """
    if labels.shape != answer.shape[:1] + answer.shape[2:]:
        raise ConfigError(
            f"labels of shape {tuple(labels.shape)} came for an answer of shape {tuple(answer.shape)}; give one label "
            f"per pixel, (B, H, W)"
        )
    check_labels(labels, answer.shape[1], void, "a batch of labels")


def pixel_cross_entropy(logits: Tensor, labels: Tensor, void: int) -> Tensor:
    """The mean cross-entropy over pixels with a class; 0 if there are none.

    Args:
        logits: (B, classes, ...).
        labels: (B, ...), int64.
        void: the label of pixels without a class.
    """
    total = functional.cross_entropy(logits, labels, ignore_index=void, reduction="sum")
    return total / (labels != void).sum().clamp(min=1)
