"""A small vision transformer with exits, for small images: the practical default beside `staged_resnet`.

Pre-norm blocks of Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021, https://arxiv.org/abs/2010.11929.
Instead of cutting patches, strided convolutions make the tokens (Xiao et al.: Early Convolutions Help Transformers See
Better, NeurIPS 2021, https://arxiv.org/abs/2106.14881), and instead of a class token, exits read the mean of all
tokens, so that each has its own. 37 million MACs on 32 x 32 pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.nets.blocks import classifier, init_truncated
from dynanet.zoo.exits import check_exits, split_at
from dynanet.zoo.vit_config import ViTConfig


@architecture
def vit_exits(  # noqa: D417 (the sizes are documented in ViTConfig)
    *,
    num_classes: int,
    in_channels: int = 3,
    size: int = 32,
    patch: int = 4,
    width: int = 96,
    depth: int = 6,
    heads: int = 3,
    expansion: int = 2,
    exits: Sequence[int] = (1, 3, 5),
) -> EarlyExit:
    """A vision transformer with exits after some of its blocks.

    Sizes are those of `ViTConfig`; `patch` must be a power of two.

    Args:
        exits: after which blocks a sample may leave, counted from 0 in ascending order, the last block included.

    Returns:
        An EarlyExit with one step per exit; (B, C, size, size) to logits (B, num_classes).

    Raises:
        ConfigError: as `ViTConfig`, a patch that is not a power of two, or exits without the last block.

    Example:
        >>> model = vit_exits(num_classes=10)
        >>> [tuple(logits.shape) for logits in model.answers(torch.zeros(2, 3, 32, 32))]
        [(2, 10), (2, 10), (2, 10)]
    """
    config = ViTConfig(num_classes, in_channels, size, patch, width, depth, heads, expansion)
    stem, blocks = _body(config)
    ends = check_exits(exits, depth)
    return EarlyExit(split_at(blocks, ends, stem), [Classifier(width, num_classes) for _ in ends])


@architecture
def vit_static(
    *,
    num_classes: int,
    in_channels: int = 3,
    size: int = 32,
    patch: int = 4,
    width: int = 96,
    depth: int = 6,
    heads: int = 3,
    expansion: int = 2,
) -> nn.Sequential:
    """The same network with its last exit only: the static network to compare with, at any `width` or `depth`.

    Arguments are as in `vit_exits`.

    Raises:
        ConfigError: as `vit_exits`.
    """
    stem, blocks = _body(ViTConfig(num_classes, in_channels, size, patch, width, depth, heads, expansion))
    return nn.Sequential(stem, *blocks, Classifier(width, num_classes))


class PatchTokens(nn.Module):
    """Images to tokens with their positions, by 3x3 convolutions of stride 2."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        width = config.width
        inputs = config.in_channels
        for left in range(config.patch.bit_length() - 2, -1, -1):
            outputs = max(1, width // 2**left)
            layers += [nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.convolutions = nn.Sequential(*layers, nn.Conv2d(inputs, width, 1))
        self.positions = nn.Parameter(torch.empty(1, config.tokens, width))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, size, size) to (B, T, D)."""
        self.config.check_images(x_BCHW)
        return self.convolutions(x_BCHW).flatten(2).transpose(1, 2) + self.positions


class Block(nn.Module):
    """Attention among all tokens, then a hidden layer for each."""

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_a = nn.LayerNorm(width)
        self.norm_b = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))
        init_truncated(self.query_key_value, self.project, self.hidden[0], self.hidden[2])

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to the same shape."""
        q, k, v = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for z in self.query_key_value(self.norm_a(x_BTD)).chunk(3, -1)
        )
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BTD = x_BTD + self.project(attended)
        return x_BTD + self.hidden(self.norm_b(x_BTD))


class Classifier(nn.Module):
    """Norm, mean over the tokens, linear layer."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = classifier(width, num_classes)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to logits (B, num_classes)."""
        return self.linear(self.norm(x_BTD).mean(1))


def _body(config: ViTConfig) -> tuple[nn.Module, list[nn.Module]]:
    """The stem and the blocks."""
    if config.patch & (config.patch - 1):
        raise ConfigError(f"patch must be a power of two, got {config.patch}")
    return PatchTokens(config), [Block(config.width, config.heads, config.expansion) for _ in range(config.depth)]
