"""A small residual network with an exit after every block: the practical net for small images on small machines.

Basic blocks of He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016,
https://arxiv.org/abs/1512.03385, with exits as in Teerapittayanon et al.: BranchyNet, 2016,
https://arxiv.org/abs/1709.01686. The stem strides, which makes the net half as dear as a ResNet-20: 17 million MACs on
32 x 32 pixels against 41 (18.5 with `context` at three exits).
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError
from dynanet.mechanisms.early_exit import EarlyExit


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
            block's resolution, so that these exits read the layout of the image and not only its mean; 0 for none.
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
    leave = range(len(blocks)) if exits == "all" else exits
    if (
        not leave
        or isinstance(leave, str)
        or sorted(set(leave)) != list(leave)
        or leave[0] < 0
        or leave[-1] != len(blocks) - 1
    ):
        raise ConfigError(
            f"staged_resnet: exits is {exits!r}; expected ascending numbers of blocks from 0 to "
            f"{len(blocks) - 1}, the last included, or 'all'"
        )
    if context < 0:
        raise ConfigError(f"staged_resnet: context is {context}; expected channels, or 0 for no convolution")
    level = [i for i, depth in enumerate(depths) for _ in range(depth)]  # of every block
    stages, heads, first = [], [], 0
    for last in leave:
        stages.append(nn.Sequential(*blocks[first : last + 1]))
        shrink = 2 ** (len(widths) - 1 - level[last])
        heads.append(_exit(widths[level[last]], num_classes, context if last < leave[-1] else 0, shrink))
        first = last + 1
    return EarlyExit(stages, heads)


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
    """The same backbone with its last exit only: what an EarlyExit has to be compared with.

    Args:
        num_classes: width of the logits.
        in_channels: as in `staged_resnet`.
        widths: as in `staged_resnet`.
        depths: as in `staged_resnet`.
        stem_stride: as in `staged_resnet`.
        width_multiplier: scales every width, rounded to whole channels; MACs grow about with its square. With it, a
            static net is brought to the MACs of a dynamic one at its budget.

    Returns:
        (B, C, H, W) -> (B, num_classes).

    Raises:
        ConfigError: a value out of range, or widths and depths of unequal number.
    """
    if not width_multiplier > 0:
        raise ConfigError(f"static_resnet: width_multiplier is {width_multiplier}; expected a number above 0")
    widths = [max(1, round(width * width_multiplier)) for width in widths]
    _check(widths, depths, num_classes=num_classes, in_channels=in_channels, stem_stride=stem_stride)
    blocks = _blocks(in_channels, widths, depths, stem_stride)
    return nn.Sequential(*blocks, _exit(widths[-1], num_classes, context=0, shrink=1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where width or resolution changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *_conv_bn(inputs, outputs, 3, stride), nn.ReLU(inplace=True), *_conv_bn(outputs, outputs, 3)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv_bn(inputs, outputs, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.relu(self.branch(x) + self.shortcut(x))


def _blocks(in_channels: int, widths: Sequence[int], depths: Sequence[int], stem_stride: int) -> list[nn.Module]:
    """The backbone's blocks in order; the stem belongs to the first."""
    blocks: list[nn.Module] = []
    inputs = widths[0]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for d in range(depth):
            blocks.append(BasicBlock(inputs, width, stride=2 if i > 0 and d == 0 else 1))
            inputs = width
    stem = nn.Sequential(*_conv_bn(in_channels, widths[0], 3, stem_stride), nn.ReLU(inplace=True))
    return [nn.Sequential(stem, blocks[0]), *blocks[1:]]


def _exit(width: int, num_classes: int, context: int, shrink: int) -> nn.Sequential:
    """Global average and a linear layer; before them, with `context`, a convolution on features `shrink` times smaller.

    It reads averages because it is to see far and cost little.
    """
    layers: list[nn.Module] = []
    if context:
        # ceil_mode: any size will do, and nothing at the edge is lost.
        layers += [nn.AvgPool2d(shrink, ceil_mode=True)] if shrink > 1 else []
        layers += [*_conv_bn(width, context, 3), nn.ReLU(inplace=True)]
        width = context
    linear = nn.Linear(width, num_classes)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """He initialisation by fan-out."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _check(widths: Sequence[int], depths: Sequence[int], **counts: int) -> None:
    if len(widths) != len(depths) or not len(widths):
        raise ConfigError(
            f"staged_resnet: {len(widths)} widths {tuple(widths)} and {len(depths)} depths {tuple(depths)}; "
            f"expected one of each per resolution"
        )
    for name, values in {"widths": widths, "depths": depths, **{k: [v] for k, v in counts.items()}}.items():
        if any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in values):
            raise ConfigError(f"staged_resnet: {name} is {values}; expected whole numbers of at least 1")
