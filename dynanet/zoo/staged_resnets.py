"""A small residual network with an exit after every block: the practical net for small images on small machines.

Basic blocks of He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016,
https://arxiv.org/abs/1512.03385, with exits as in Teerapittayanon et al.: BranchyNet, 2016,
https://arxiv.org/abs/1709.01686. The stem has stride 2, which halves the cost of a ResNet-20: 17 million MACs on
32 x 32 pixels against 41 (18.5 with `context` at three exits).
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, check_sizes
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.nets.blocks import conv_bn, conv_bn_relu, pooled_classifier
from dynanet.zoo.exits import check_exits, split_at


@architecture
def staged_resnet(
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = (32, 64, 128),
    depths: Sequence[int] = (1, 2, 1),
    stem_stride: int = 2,
    exits: Sequence[int] | Literal["all"] = "all",
    context: int = 64,
) -> EarlyExit:
    """A residual network with exits; images (B, C, H, W) of any size.

    Args:
        num_classes: width of every exit's logits.
        in_channels: channels (bands) of the input.
        widths: channels of each resolution; every one after the first halves height and width.
        depths: blocks at each resolution.
        stem_stride: stride of the first convolution.
        exits: after which blocks a sample may leave, counted from 0 in ascending order, the last block included.
        context: channels of a convolution in front of the earlier exits, over features averaged down to the last
            block's resolution, so that these exits see the layout of the image and not only its mean; 0 for none.
            64 cost 6 % of the first exit's MACs and gave it 8 to 10 points on held-out CIFAR-10 training images
            (10,000 images, 8 epochs, two seeds), the last exit 0.4 to 2.

    Returns:
        An EarlyExit with one step per exit; logits are (B, num_classes).

    Raises:
        ConfigError: a value out of range, widths and depths of unequal number, or exits without the last block.

    Example:
        >>> import torch
        >>> model = staged_resnet(num_classes=10)
        >>> [tuple(logits.shape) for logits in model.answers(torch.zeros(2, 3, 32, 32))]
        [(2, 10), (2, 10), (2, 10), (2, 10)]
    """
    _check(widths, depths, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)
    blocks = _blocks(in_channels, widths, depths, stem_stride)
    ends = check_exits(range(len(blocks)) if exits == "all" else exits, len(blocks))
    check_sizes(0, context=context)
    level = [i for i, depth in enumerate(depths) for _ in range(depth)]  # of every block
    heads = []
    for last in ends:
        shrink = 2 ** (len(widths) - 1 - level[last])
        heads.append(_exit(widths[level[last]], num_classes, context if last < ends[-1] else 0, shrink))
    return EarlyExit(split_at(blocks, ends), heads)


@architecture
def static_resnet(
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = (32, 64, 128),
    depths: Sequence[int] = (1, 2, 1),
    stem_stride: int = 2,
    width_multiplier: float = 1.0,
) -> nn.Sequential:
    """The same backbone with its last exit only: the static network to compare with.

    Args:
        num_classes: width of the logits.
        in_channels: as in `staged_resnet`.
        widths: as in `staged_resnet`.
        depths: as in `staged_resnet`.
        stem_stride: as in `staged_resnet`.
        width_multiplier: scales every width, rounded to whole channels; MACs grow about with its square. Use it to
            match the MACs of a dynamic network at its budget.

    Returns:
        (B, C, H, W) -> (B, num_classes).

    Raises:
        ConfigError: a value out of range, or widths and depths of unequal number.
    """
    if not width_multiplier > 0:
        raise ConfigError(f"width_multiplier must be above 0, got {width_multiplier}")
    widths = [max(1, round(width * width_multiplier)) for width in widths]
    _check(widths, depths, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)
    blocks = _blocks(in_channels, widths, depths, stem_stride)
    return nn.Sequential(*blocks, _exit(widths[-1], num_classes, context=0, shrink=1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where width or resolution changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *conv_bn(inputs, outputs, 3, stride), nn.ReLU(inplace=True), *conv_bn(outputs, outputs, 3)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride), rounded up."""
        return self.relu(self.branch(x) + self.shortcut(x))


def _blocks(in_channels: int, widths: Sequence[int], depths: Sequence[int], stem_stride: int) -> list[nn.Module]:
    """The backbone's blocks in order; the stem belongs to the first."""
    blocks: list[nn.Module] = []
    inputs = widths[0]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for d in range(depth):
            blocks.append(BasicBlock(inputs, width, stride=2 if i > 0 and d == 0 else 1))
            inputs = width
    stem = conv_bn_relu(in_channels, widths[0], 3, stem_stride)
    return [nn.Sequential(stem, blocks[0]), *blocks[1:]]


def _exit(width: int, num_classes: int, context: int, shrink: int) -> nn.Sequential:
    """Global average and a linear layer; before them, with `context`, a convolution on features `shrink` times smaller.

    The convolution reads averages because it has to see far at little cost.
    """
    layers: list[nn.Module] = []
    if context:
        if shrink > 1:
            layers.append(nn.AvgPool2d(shrink, ceil_mode=True))  # any image size, and the border is not cut off
        layers += conv_bn_relu(width, context, 3)
        width = context
    return nn.Sequential(*layers, *pooled_classifier(width, num_classes))


def _check(widths: Sequence[int], depths: Sequence[int], **counts: int) -> None:
    if len(widths) != len(depths) or not widths:
        raise ConfigError(
            f"{len(widths)} widths {tuple(widths)} and {len(depths)} depths {tuple(depths)}; "
            f"expected one of each per resolution"
        )
    check_sizes(widths=widths, depths=depths, **counts)
