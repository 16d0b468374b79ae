"""A small VGG and a ResNet for CIFAR whose convolutions keep the channels that matter for the image at hand.

The M-CifarNet of Gao, Zhao, Dudziak, Mullins, Xu: Dynamic Channel Pruning: Feature Boosting and Suppression, ICLR 2019,
https://arxiv.org/abs/1810.05331: eight 3x3 convolutions, global average pooling, a linear layer. And the networks for
small images of He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385.
"""

from collections.abc import Sequence

from torch import nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, check_sizes
from dynanet.mechanisms.channel_skip import ChannelSkip, fbs_gate
from dynanet.nets.blocks import conv
from dynanet.nets.resnet import cifar_blocks, cifar_stem, head

WIDTHS = (64, 64, 128, 128, 128, 192, 192, 192)
STRIDES = (1, 1, 2, 1, 1, 2, 1, 1)


@architecture
def fbs(
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = WIDTHS,
    strides: Sequence[int] = STRIDES,
    groups: int | None = 4,
    density: float = 0.5,
) -> nn.Sequential:
    """M-CifarNet with feature boosting and suppression: (B, C, H, W) to logits (B, num_classes).

    Args:
        num_classes: width of the logits.
        in_channels: channels of the input.
        widths: channels of every convolution.
        strides: of every convolution. The first one is not padded, as in the paper.
        groups: number of groups in which the channels of a convolution are kept; None makes every channel a group, as
            in the paper. With few groups the images of a batch agree more often.
        density: the share of groups that every image keeps.

    Returns:
        A `ChannelSkip`, then the classifier.

    Raises:
        ConfigError: not one stride per width, groups that do not divide a width, or a density outside (0, 1].

    Example:
        >>> import torch
        >>> model = fbs(num_classes=10, widths=(8, 16), strides=(1, 2)).eval()
        >>> tuple(model(torch.zeros(2, 3, 32, 32)).shape)
        (2, 10)
    """
    _check(num_classes, in_channels, widths, strides, groups)
    counts = [groups if groups is not None else width for width in widths]
    convs = []
    norms = []
    gates = []
    inputs = in_channels
    for i, (width, stride) in enumerate(zip(widths, strides, strict=True)):
        convs.append(_conv(i, inputs, width, stride))
        norms.append(nn.BatchNorm2d(width))
        gates.append(fbs_gate(inputs, counts[i], density))
        inputs = width
    chain = ChannelSkip(convs, gates, counts, norms=norms, boost=True)
    return nn.Sequential(chain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


@architecture
def fbs_resnet(
    *,
    num_classes: int,
    in_channels: int = 3,
    depth: int = 20,
    widths: Sequence[int] = (16, 32, 64),
    groups: int | None = 4,
    density: float = 0.5,
) -> nn.Sequential:
    """A CIFAR ResNet whose blocks boost and suppress channels: (B, C, H, W) to logits (B, num_classes).

    Every block's two convolutions are one chain. Groups that the second one skips add nothing to the shortcut. Stem,
    shortcuts and classifier always run. Saliencies are relative to the image's own magnitude (`SaliencyScorer`), as
    magnitudes grow from block to block in a residual network.

    Args:
        num_classes: width of the logits.
        in_channels: channels of the input.
        depth: 6n + 2, with n blocks at each of three resolutions.
        widths: channels at each resolution.
        groups: as in `fbs`.
        density: as in `fbs`.

    Returns:
        A network with a `ChannelSkip` in every block; `nets.resnet.cifar_resnet` is the same one without gates.

    Raises:
        ConfigError: a depth that is not 6n + 2, groups that do not divide a width, or a density outside (0, 1].
    """
    _check(num_classes, in_channels, widths, widths, groups)
    blocks = cifar_blocks(depth, widths)
    for block in blocks:
        found = [m for m in block.branch.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
        convs = [m for m in found if isinstance(m, nn.Conv2d)]
        counts = [groups if groups is not None else conv.out_channels for conv in convs]
        gates = [
            fbs_gate(conv.in_channels, count, density, relative=True) for conv, count in zip(convs, counts, strict=True)
        ]
        norms = [m for m in found if isinstance(m, nn.BatchNorm2d)]
        block.branch = ChannelSkip(convs, gates, counts, norms=norms, afters=[nn.ReLU(), nn.Identity()], boost=True)
    return nn.Sequential(cifar_stem(in_channels, widths[0]), *blocks, head(widths[-1], num_classes))


@architecture
def static_vgg(
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = WIDTHS,
    strides: Sequence[int] = STRIDES,
    width_multiplier: float = 1.0,
) -> nn.Sequential:
    """The same network without gates: the static network to compare with.

    Args:
        num_classes: as in `fbs`.
        in_channels: as in `fbs`.
        widths: as in `fbs`.
        strides: as in `fbs`.
        width_multiplier: scales every width, rounded to whole channels; MACs grow about with its square.

    Returns:
        (B, C, H, W) -> (B, num_classes).

    Raises:
        ConfigError: not one stride per width, or a multiplier that is not above 0.
    """
    if not width_multiplier > 0:
        raise ConfigError(f"width_multiplier must be above 0, got {width_multiplier}")
    widths = [max(1, round(width * width_multiplier)) for width in widths]
    _check(num_classes, in_channels, widths, strides, None)
    layers: list[nn.Module] = []
    inputs = in_channels
    for i, (width, stride) in enumerate(zip(widths, strides, strict=True)):
        layers += [_conv(i, inputs, width, stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


def _conv(i: int, inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    """Convolution i, counted from 0; the first is not padded."""
    layer = conv(inputs, outputs, 3, stride)
    if i == 0:
        layer.padding = (0, 0)
    return layer


def _check(
    num_classes: int, in_channels: int, widths: Sequence[int], strides: Sequence[int], groups: int | None
) -> None:
    check_sizes(num_classes=num_classes, in_channels=in_channels, widths=widths, strides=strides)
    if not widths or len(widths) != len(strides):
        raise ConfigError(f"{len(widths)} widths and {len(strides)} strides; expected one stride per width")
    if groups is not None and (groups < 1 or any(width % groups for width in widths)):
        raise ConfigError(f"groups must divide every width of {tuple(widths)}, got {groups}")
