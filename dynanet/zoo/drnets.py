"""DRNet: a small predictor chooses, per image, the input size of the network.

Zhu, Han, Wu, Zhang, Nie, Lan, Wang: Dynamic Resolution Network, NeurIPS 2021, https://arxiv.org/abs/2106.02898.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError
from dynanet.core.gate import Gate
from dynanet.gates.rules import RelaxedTopK
from dynanet.gates.scorers import PooledScorer
from dynanet.mechanisms.resolution_select import ResolutionSelect
from dynanet.nets.resnet import Residual, basic_block, cifar_resnet, cifar_stem, imagenet_resnet, imagenet_stem
from dynanet.nets.spatial_transformer import Resize


@architecture
def drnet(
    *,
    num_classes: int,
    in_channels: int = 3,
    sizes: Sequence[int] = (16, 24, 32),
    depth: int = 14,
    widths: Sequence[int] = (16, 32, 64),
    predictor_size: int = 16,
    predictor_widths: Sequence[int] = (8, 16, 32),
) -> ResolutionSelect:
    """DRNet for small images: (B, C, H, W) of any size to (B, num_classes).

    Args:
        num_classes: width of the logits.
        in_channels: channels of the input.
        sizes: image sides to choose from, ascending.
        depth: of the network, 6n + 2.
        widths: channels at each resolution of the network.
        predictor_size: side of the predictor's input.
        predictor_widths: channels of its stem and of its blocks, which halve the resolution.

    Returns:
        One layer with a unit per size. Its rule holds the costs of the sizes relative to the largest, so that
        `path_select.price_for` meets other budgets without further training.

    Raises:
        ConfigError: fewer than two sizes, sizes that do not ascend, or a depth that is not 6n + 2.

    Example:
        >>> import torch
        >>> drnet(num_classes=10).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    net = cifar_resnet(num_classes=num_classes, depth=depth, in_channels=in_channels, widths=widths)
    blocks = [basic_block(inputs, outputs, stride=2) for inputs, outputs in pairwise(predictor_widths)]
    stem = cifar_stem(in_channels, predictor_widths[0])
    return _picked(net, stem, blocks, predictor_widths[-1], sizes, predictor_size)


@architecture
def drnet_imagenet(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    sizes: Sequence[int] = (112, 168, 224),
    depth: int = 50,
    predictor_size: int = 128,
    predictor_widths: Sequence[int] = (64, 128, 256, 512),
) -> ResolutionSelect:
    """DRNet on ResNets, for images of about 224 x 224 pixels; the defaults are the authors' sizes.

    Args:
        num_classes: as in `drnet`.
        in_channels: as in `drnet`.
        sizes: as in `drnet`.
        depth: of the network: 50, 101 or 152.
        predictor_size: as in `drnet`.
        predictor_widths: channels of the predictor's blocks, after a stem of 64; a wider one halves the resolution.

    Returns:
        As `drnet`.

    Raises:
        ConfigError: as `drnet`, or another depth.
    """
    net = imagenet_resnet(num_classes=num_classes, depth=depth, in_channels=in_channels)
    blocks = [
        basic_block(inputs, outputs, stride=1 if inputs == outputs else 2)
        for inputs, outputs in pairwise((64, *predictor_widths))
    ]
    return _picked(net, imagenet_stem(in_channels), blocks, predictor_widths[-1], sizes, predictor_size)


def _picked(
    net: nn.Module, stem: nn.Module, blocks: Sequence[Residual], outputs: int, sizes: Sequence[int], look: int
) -> ResolutionSelect:
    """The network at the size with the highest score."""
    if list(sizes) != sorted(set(sizes)):
        raise ConfigError(f"sizes must be ascending sides in pixels, got {tuple(sizes)}")
    scorer = nn.Sequential(Resize(look), stem, *blocks, PooledScorer(outputs, len(sizes), hidden=0, bias=0.0))
    with torch.device("cpu"):  # the rule reads its costs, which a meta tensor does not have
        rule = RelaxedTopK(noise=True, hard=True, costs=[(size / sizes[-1]) ** 2 for size in sizes])
    return ResolutionSelect(net, sizes, Gate(scorer, rule, units=len(sizes)))
