"""Parts of residual networks: stems, lists of blocks, heads. Networks that skip blocks are assembled from these.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, https://arxiv.org/abs/1512.03385. For
CIFAR (section 4.2) 6n + 2 layers: n basic blocks at each of three resolutions; for ImageNet (table 1) bottlenecks at
four.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from dynanet.core.errors import ConfigError, check_choice, check_sizes
from dynanet.nets.blocks import conv_bn, conv_bn_relu, pooled_classifier

BOTTLENECKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def cifar_resnet(
    *, num_classes: int, depth: int = 110, in_channels: int = 3, widths: Sequence[int] = (16, 32, 64)
) -> nn.Sequential:
    """The static network for small images: (B, C, H, W) to (B, num_classes).

    Args:
        num_classes: width of the logits.
        depth: 6n + 2.
        in_channels: channels of the input.
        widths: channels at each resolution.

    Raises:
        ConfigError: a depth that is not 6n + 2.
    """
    blocks = cifar_blocks(depth, widths)
    return nn.Sequential(cifar_stem(in_channels, widths[0]), *blocks, head(widths[-1], num_classes))


def imagenet_resnet(*, num_classes: int = 1000, depth: int = 50, in_channels: int = 3) -> nn.Sequential:
    """The static network for large images: (B, C, H, W) to (B, num_classes).

    Raises:
        ConfigError: a depth other than 50, 101 or 152.
    """
    return nn.Sequential(imagenet_stem(in_channels), *imagenet_blocks(depth), head(2048, num_classes))


class Residual(nn.Module):
    """relu(shortcut(x) + branch(x)), with both halves as attributes, so that a network can skip one.

    Attributes:
        branch: the part that a gate may skip.
        shortcut: added to it, before the ReLU.
        inputs: channels of x.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module, inputs: int) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.relu = nn.ReLU(inplace=True)
        self.inputs = inputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        return self.relu(self.shortcut(x_BCHW) + self.branch(x_BCHW))


class PadShortcut(nn.Module):
    """The shortcut without parameters: every stride-th position, padded with channels of zeros (option A)."""

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.more = more
        self.stride = stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C + more, H / stride, W / stride), rounded up."""
        x = x_BCHW[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.more))


def basic_block(inputs: int, outputs: int, stride: int = 1) -> Residual:
    """Two 3x3 convolutions; the shortcut has no parameters."""
    same = inputs == outputs and stride == 1
    branch = nn.Sequential(*conv_bn_relu(inputs, outputs, 3, stride), *conv_bn(outputs, outputs, 3))
    return Residual(branch, nn.Identity() if same else PadShortcut(outputs - inputs, stride), inputs)


def bottleneck(inputs: int, width: int, stride: int = 1) -> Residual:
    """1x1, 3x3 (which strides) and 1x1 to 4 * width channels; where the shape changes the shortcut is a convolution."""
    outputs = 4 * width
    branch = nn.Sequential(
        *conv_bn_relu(inputs, width, 1), *conv_bn_relu(width, width, 3, stride), *conv_bn(width, outputs, 1)
    )
    same = inputs == outputs and stride == 1
    return Residual(branch, nn.Identity() if same else conv_bn(inputs, outputs, 1, stride), inputs)


def cifar_blocks(depth: int, widths: Sequence[int] = (16, 32, 64)) -> list[Residual]:
    """The 3n blocks of a network of 6n + 2 layers; every resolution but the first starts with stride 2.

    Raises:
        ConfigError: another depth, or not three widths that do not shrink.
    """
    if not isinstance(depth, int) or depth < 8 or (depth - 2) % 6:
        raise ConfigError(f"depth must be 6n + 2 (8, 14, 20, 32, 56, 110, ...), got {depth}")
    if len(widths) != 3 or widths[0] < 1 or sorted(widths) != list(widths):
        raise ConfigError(f"widths must be three, none smaller than the one before, got {tuple(widths)}")
    blocks = []
    inputs = widths[0]
    for level, width in enumerate(widths):
        for n in range((depth - 2) // 6):
            blocks.append(basic_block(inputs, width, stride=2 if level and n == 0 else 1))
            inputs = width
    return blocks


def imagenet_blocks(depth: int) -> list[Residual]:
    """The bottlenecks of ResNet-50, 101 or 152.

    Raises:
        ConfigError: another depth.
    """
    check_choice("depth", depth, BOTTLENECKS)
    blocks = []
    inputs = 64
    for level, count in enumerate(BOTTLENECKS[depth]):
        width = 64 * 2**level
        for n in range(count):
            blocks.append(bottleneck(inputs, width, stride=2 if level and n == 0 else 1))
            inputs = 4 * width
    return blocks


def cifar_stem(in_channels: int, width: int) -> nn.Sequential:
    """A 3x3 convolution, batch norm, ReLU."""
    check_sizes(in_channels=in_channels)
    return conv_bn_relu(in_channels, width, 3)


def imagenet_stem(in_channels: int) -> nn.Sequential:
    """A 7x7 convolution with batch norm and ReLU, and a pooling, both with stride 2."""
    return nn.Sequential(*conv_bn_relu(in_channels, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1))


def head(width: int, num_classes: int) -> nn.Sequential:
    """Global average and a linear layer.

    Raises:
        ConfigError: fewer than one class.
    """
    check_sizes(num_classes=num_classes)
    return pooled_classifier(width, num_classes)
