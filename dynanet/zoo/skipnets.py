"""SkipNet: a ResNet whose blocks are skipped by gates, image by image.

Wang, Yu, Dou, Darrell, Gonzalez: SkipNet: Learning Dynamic Routing in Convolutional Networks, ECCV 2018,
https://arxiv.org/abs/1711.09485. Trained in two stages: with soft gates (as built here), then with sampled ones and
REINFORCE (`train.sample_gates(model)`, then `train.Reinforce(train.SkipReward(alpha))` plus the cross-entropy).
"""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import check_choice
from dynanet.core.gate import Gate
from dynanet.gates.recurrent import RecurrentGate
from dynanet.gates.rules import Sigmoid
from dynanet.mechanisms.layer_skip import LayerSkip, RecurrentSkip
from dynanet.nets.resnet import cifar_blocks, cifar_stem, head


@architecture
def skipnet(
    *,
    num_classes: int,
    depth: int = 110,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 32, 64),
    gate: Literal["recurrent", "feedforward"] = "recurrent",
    bias: float = 2.0,
) -> nn.Sequential:
    """SkipNet for small images: (B, C, H, W) to (B, num_classes).

    The stem and the first block always run; every other block has a gate, which sees the block's input.

    Args:
        num_classes: width of the logits.
        depth: 6n + 2; the authors' are 38, 74, 110 and 152.
        in_channels: channels of the input.
        widths: channels at each resolution.
        gate: "recurrent": one LSTM of 10 units for all blocks, at a thousandth of their cost; "feedforward": a 3x3
            convolution with stride 2 per block (the paper's FFGate-II), which costs an eighth of the block.
        bias: of the scores at the start. Positive: every block runs at first.

    Returns:
        Stem, first block, the skipped blocks, head. Rules are `Sigmoid`: soft in training, hard in eval mode.

    Raises:
        ConfigError: a depth that is not 6n + 2, or another gate.

    Example:
        >>> import torch
        >>> skipnet(num_classes=10, depth=14).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_choice("gate", gate, ("recurrent", "feedforward"))
    first, *blocks = cifar_blocks(depth, widths)
    channels = [block.inputs for block in blocks]
    body: list[nn.Module]
    if gate == "recurrent":
        recurrent = RecurrentGate(channels, Sigmoid(), bias=bias)
        body = [RecurrentSkip(blocks, recurrent, [block.shortcut for block in blocks])]
    else:
        body = [LayerSkip(block, Gate(_scorer(block.inputs, bias), Sigmoid()), block.shortcut) for block in blocks]
    return nn.Sequential(cifar_stem(in_channels, widths[0]), first, *body, head(widths[-1], num_classes))


def _scorer(channels: int, bias: float) -> nn.Sequential:
    """The paper's FFGate-II with one score instead of two."""
    last = nn.Linear(channels, 1)
    nn.init.constant_(last.bias, bias)
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        last,
    )
