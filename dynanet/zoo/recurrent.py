"""A recurrent network that stops reading a sequence once it is confident: sounds, tracks, sensor series.

A GRU (Cho et al. 2014, https://arxiv.org/abs/1406.1078) with one head for all steps, and stops by confidence after
every few frames. Sizes are our own, for small machines. See `mechanisms.early_stop`.
"""

from torch import nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import check_sizes
from dynanet.mechanisms.early_stop import EarlyStop


@architecture
def recurrent_stop(*, num_classes: int, in_channels: int, longest: int, hidden: int = 64, every: int = 5) -> EarlyStop:
    """A GRU that may answer every few frames; sequences (B, T, in_channels), or `data.ragged.Sequences` of them.

    Args:
        num_classes: width of the logits.
        in_channels: features of a frame.
        longest: frames of the longest sequence.
        hidden: size of the state.
        every: frames between two decisions to stop.

    Raises:
        ConfigError: a size below 1.

    Example:
        >>> import torch
        >>> model = recurrent_stop(num_classes=10, in_channels=40, longest=100)
        >>> model(torch.zeros(2, 30, 40)).shape, model.steps
        (torch.Size([2, 10]), 20)
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels, longest=longest, hidden=hidden, every=every)
    cell = nn.GRUCell(in_channels, hidden)
    return EarlyStop(cell, nn.Linear(hidden, num_classes), in_channels, hidden, longest, every=every)
