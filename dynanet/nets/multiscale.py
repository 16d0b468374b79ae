"""What MSDNet and RANet share: the stem's finest scale, growing convolutions, and the classifier of an exit."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dynanet.nets.blocks import classifier, conv, conv_bn_relu

HEADS = ("cifar", "imagenet")


def finest_scale(in_channels: int, width: int, head: str) -> nn.Sequential:
    """The stem at full resolution: a 3x3 convolution ("cifar"), or a strided 7x7 one and a pooling ("imagenet")."""
    if head == "cifar":
        return conv_bn_relu(in_channels, width, 3)
    return nn.Sequential(
        conv(in_channels, width, 7, 2, bias=True),  # the only convolution with a bias in the authors' code
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def grow_conv(inputs: int, outputs: int, factor: int | None, stride: int = 1) -> nn.Sequential:
    """A 1x1 convolution to at most `factor * outputs` channels (none if `factor` is None), then a 3x3 one.

    Each is followed by a batch norm and a ReLU.
    """
    if factor is None:
        return conv_bn_relu(inputs, outputs, 3, stride)
    hidden = min(inputs, factor * outputs)
    return nn.Sequential(*conv_bn_relu(inputs, hidden, 1), *conv_bn_relu(hidden, outputs, 3, stride))


class ConvExit(nn.Module):
    """The classifier of an exit: two 3x3 convolutions of stride 2, average pooling, a linear layer.

    Args:
        width: channels of the features.
        hidden: channels of the convolutions.
        num_classes: width of the logits.
        select: takes the features (B, width, H, W) out of what the stages pass on.
    """

    def __init__(self, width: int, hidden: int, num_classes: int, select: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.select = select
        self.convs = nn.Sequential(conv_bn_relu(width, hidden, 3, 2), conv_bn_relu(hidden, hidden, 3, 2))
        # The authors pool 2 x 2, which at their image sizes is the same, and works at no other size.
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = classifier(hidden, num_classes)

    def forward(self, state: Any) -> Tensor:
        """The state of the stages to logits (B, num_classes)."""
        return self.linear(self.pool(self.convs(self.select(state))).flatten(1))
