"""A slimmable MobileNet whose gate chooses a width per image, after early stages of fixed width.

Li, Wang, Wang, Liang, Li, Chang: Dynamic Slimmable Network, CVPR 2021, https://arxiv.org/abs/2103.13023, on Howard et
al.: MobileNets, 2017, https://arxiv.org/abs/1704.04861.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, check_sizes
from dynanet.core.gate import Gate
from dynanet.gates.rules import RelaxedTopK
from dynanet.mechanisms.slimmable import DoubleHead, Slimmable
from dynanet.nets.slim import Slim, SlimBatchNorm2d, SlimConv2d, SlimLinear, SlimSequential, scaled

DEPTHS = (1, 2, 2, 6, 2)  # of MobileNet's stages after the stem


@architecture
def ds_net(
    *,
    num_classes: int,
    in_channels: int = 3,
    early: Sequence[int] = (16, 32, 48, 96),
    middle: Sequence[int] = (224, 352, 512, 640),
    late: Sequence[int] = (736, 864, 1024, 1152),
    depths: Sequence[int] = DEPTHS,
    strides: Sequence[int] = (2, 1, 2, 2, 2, 2),
    hidden: int | None = None,
) -> nn.Sequential:
    """DS-Net on MobileNetV1: (B, C, H, W) to logits (B, num_classes).

    Args:
        num_classes: width of the logits.
        in_channels: channels of the input.
        early: channels of the stem and of the first three stages, the same for every image.
        middle: channels of the fourth stage at every width, ascending; the paper's run from 224 to 640.
        late: channels of the fifth stage at every width; the paper's run from 736 to 1,152.
        depths: separable convolutions per stage.
        strides: of the stem and of every stage's first convolution. (1, 1, 2, 2, 2, 1) suits 32 x 32 pixels.
        hidden: width of the gate's hidden layer; a quarter of its input channels if None.

    Returns:
        The early stages, then a `Slimmable` with a unit per width. A new model's gate is not trained: train the widths
        first, with `model[1].between = 2` and `model[1].bootstrap()`, then the gate.

    Raises:
        ConfigError: widths that do not ascend or differ in number between the stages; another number of stages.

    Example:
        >>> import torch
        >>> model = ds_net(num_classes=10, strides=(1, 1, 2, 2, 2, 1)).eval()
        >>> tuple(model(torch.zeros(2, 3, 32, 32)).shape)
        (2, 10)
    """
    if len(middle) != len(late) or any(a >= b for stage in (middle, late) for a, b in pairwise(stage)):
        raise ConfigError(
            f"middle and late must be ascending and of the same length, got {tuple(middle)} and {tuple(late)}"
        )
    if len(early) != 4 or len(depths) != 5 or len(strides) != 6:
        raise ConfigError(
            f"{len(early)} early channels, {len(depths)} depths and {len(strides)} strides; expected 4, 5 and 6"
        )
    widths = len(middle)
    first = _mobilenet([(c,) for c in early], in_channels, depths[:3], strides[:4])
    channels = (early[-1],) * widths
    body = [*_stage(channels, middle, depths[3], strides[4]), *_stage(middle, late, depths[4], strides[5])]
    gate = Gate(DoubleHead(early[-1], widths, hidden), RelaxedTopK(noise=True, hard=True), units=widths)
    return nn.Sequential(
        SlimSequential(*first).at(0), Slimmable(SlimSequential(*body, *_head(late, num_classes)), gate)
    )


def slimmable_mobilenet(
    *,
    num_classes: int,
    in_channels: int = 3,
    ratios: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    channels: Sequence[int] = (32, 64, 128, 256, 512, 1024),
    depths: Sequence[int] = DEPTHS,
    strides: Sequence[int] = (2, 1, 2, 2, 2, 2),
) -> SlimSequential:
    """MobileNetV1 with every layer slimmable, and no gate (Yu et al. 2019, https://arxiv.org/abs/1812.08928).

    Args:
        num_classes: width of the logits.
        in_channels: channels of the input.
        ratios: the widths, ascending.
        channels: of the stem and of every stage at full width.
        depths: separable convolutions per stage.
        strides: of the stem and of every stage's first convolution.

    Returns:
        `net(x, u)` runs width u; `net.at(u)` is a plain network of that width, the static one to compare with.

    Raises:
        ConfigError: ratios that are not ascending or not in (0, 1].
    """
    slim = [scaled(c, ratios) for c in channels]
    return SlimSequential(*_mobilenet(slim, in_channels, depths, strides), *_head(slim[-1], num_classes))


def _mobilenet(
    channels: Sequence[Sequence[int]], in_channels: int, depths: Sequence[int], strides: Sequence[int]
) -> list[nn.Module]:
    """The stem, and a stage for every depth."""
    check_sizes(in_channels=in_channels, strides=strides, depths=depths)
    image = (in_channels,) * len(channels[0])
    found: list[nn.Module] = [*_normed(SlimConv2d(image, channels[0], 3, strides[0]))]
    for inputs, outputs, depth, stride in zip(channels, channels[1:], depths, strides[1:], strict=False):
        found += _stage(inputs, outputs, depth, stride)
    return found


def _stage(inputs: Sequence[int], outputs: Sequence[int], depth: int, stride: int) -> list[nn.Module]:
    """Depthwise 3x3 and pointwise convolutions, a batch norm and a ReLU after each."""
    found: list[nn.Module] = []
    for d in range(depth):
        depthwise = SlimConv2d(inputs, inputs, 3, stride if d == 0 else 1, depthwise=True)
        found += [*_normed(depthwise), *_normed(SlimConv2d(inputs, outputs, 1))]
        inputs = outputs
    return found


def _normed(conv: SlimConv2d) -> list[nn.Module]:
    return [conv, SlimBatchNorm2d(conv.outputs), nn.ReLU(inplace=True)]


def _head(channels: Sequence[int], num_classes: int) -> list[nn.Module | Slim]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), SlimLinear(channels, num_classes)]
