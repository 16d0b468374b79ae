"""ConvNet-AIG: residual networks in which a small gate per layer decides, image by image, whether the layer runs.

Veit, Belongie: Convolutional Networks with Adaptive Inference Graphs, ECCV 2018, https://arxiv.org/abs/1711.11503.
Trained in one stage with Gumbel noise and a target rate per layer: `CrossEntropy() + TargetRate(target_rates(...))`.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from dynanet.core.architecture import architecture
from dynanet.core.dynamic import layers
from dynanet.core.errors import ConfigError
from dynanet.core.gate import Gate
from dynanet.gates.rules import Gumbel
from dynanet.mechanisms.layer_skip import BranchSkip
from dynanet.nets.resnet import Residual, cifar_blocks, cifar_stem, head, imagenet_blocks, imagenet_stem


@architecture
def convnet_aig(
    *, num_classes: int = 1000, depth: int = 50, in_channels: int = 3, always: Sequence[int] = ()
) -> nn.Sequential:
    """ConvNet-AIG for large images: (B, C, H, W) to (B, num_classes). The authors' image size is 224 x 224.

    Args:
        num_classes: width of the logits.
        depth: 50, 101 or 152.
        in_channels: channels of the input.
        always: blocks without a gate, numbered from 0.

    Raises:
        ConfigError: another depth, or a block number out of range.
    """
    blocks = imagenet_blocks(depth)
    return nn.Sequential(imagenet_stem(in_channels), *_gated(blocks, always), head(2048, num_classes))


@architecture
def convnet_aig_cifar(
    *,
    num_classes: int,
    depth: int = 110,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 32, 64),
    always: Sequence[int] = (),
) -> nn.Sequential:
    """ConvNet-AIG for small images: (B, C, H, W) to (B, num_classes).

    Args:
        num_classes: width of the logits.
        depth: 6n + 2; the authors' is 110.
        in_channels: channels of the input.
        widths: channels at each resolution.
        always: blocks without a gate, numbered from 0.

    Raises:
        ConfigError: another depth, or a block number out of range.

    Example:
        >>> import torch
        >>> convnet_aig_cifar(num_classes=10, depth=14, always=(0,)).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    blocks = cifar_blocks(depth, widths)
    return nn.Sequential(cifar_stem(in_channels, widths[0]), *_gated(blocks, always), head(widths[-1], num_classes))


def target_rates(model: nn.Module, rate: float, *, first: int = 0, others: float | None = None) -> Mapping[str, float]:
    """A target rate for every gated layer of a model, for `train.TargetRate`.

    Args:
        model: the model with gated layers.
        rate: target of the layers after the first ones.
        first: number of gated layers at the start whose target is `others`.
        others: target of the first layers; `rate` if None.
    """
    names = list(layers(model))
    return {name: rate if n >= first or others is None else others for n, name in enumerate(names)}


def _gated(blocks: Sequence[Residual], always: Sequence[int]) -> list[nn.Module]:
    if not set(always) <= set(range(len(blocks))):
        raise ConfigError(f"always must be numbers of blocks from 0 to {len(blocks) - 1}, got {tuple(always)}")
    return [
        block
        if n in set(always)
        else BranchSkip(block.branch, Gate(_scorer(block.inputs), Gumbel()), block.shortcut, nn.ReLU())
        for n, block in enumerate(blocks)
    ]


def _scorer(channels: int) -> nn.Sequential:
    """The paper's gate with one score, the difference of its two; at first 1.9, a rate of 87 %."""
    last = nn.Linear(16, 1)
    nn.init.normal_(last.weight, std=0.001)
    nn.init.constant_(last.bias, 1.9)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(inplace=True),
        last,
    )
