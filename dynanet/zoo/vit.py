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
from dynanet.core.errors import ConfigError, InputError
from dynanet.mechanisms.early_exit import EarlyExit


@architecture
def vit_exits(
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

    Args:
        num_classes: width of every exit's logits.
        in_channels: channels (bands) of the input.
        size: side of the images in pixels; other sizes are refused, as positions are learned.
        patch: a token per patch x patch pixels; a power of two that divides `size`.
        width: features of a token.
        depth: blocks.
        heads: of attention; must divide `width`.
        expansion: the hidden layer of a block is so many times the width.
        exits: after which blocks a sample may leave, counted from 0 in ascending order, the last block included.

    Returns:
        An EarlyExit with one step per exit; (B, C, size, size) to logits (B, num_classes).

    Raises:
        ConfigError: a value out of range, a patch or heads that do not divide, or exits without the last block.

    Example:
        >>> model = vit_exits(num_classes=10)
        >>> [tuple(logits.shape) for logits in model.answers(torch.zeros(2, 3, 32, 32))]
        [(2, 10), (2, 10), (2, 10)]
    """
    stem, blocks = _body(in_channels, size, patch, width, depth, heads, expansion, num_classes)
    leave = list(exits)
    if leave != sorted(set(leave)) or not leave or leave[0] < 0 or leave[-1] != depth - 1:
        raise ConfigError(
            f"vit_exits: exits is {exits!r}; expected ascending numbers of blocks from 0 to {depth - 1}, the last "
            f"included"
        )
    firsts = [0, *(last + 1 for last in leave[:-1])]
    stages = [blocks[first : last + 1] for first, last in zip(firsts, leave, strict=True)]
    stages[0] = [stem, *stages[0]]
    return EarlyExit([nn.Sequential(*stage) for stage in stages], [Classifier(width, num_classes) for _ in leave])


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
    """The same network with its last exit only: what the exits have to be compared with, at any `width` or `depth`.

    Raises:
        ConfigError: as `vit_exits`.
    """
    stem, blocks = _body(in_channels, size, patch, width, depth, heads, expansion, num_classes)
    return nn.Sequential(stem, *blocks, Classifier(width, num_classes))


class PatchTokens(nn.Module):
    """Images to tokens with their positions: (B, C, size, size) to (B, T, D), by 3x3 convolutions of stride 2."""

    def __init__(self, in_channels: int, size: int, patch: int, width: int) -> None:
        super().__init__()
        self.in_channels, self.size, layers, inputs = in_channels, size, [], in_channels
        strides = patch.bit_length() - 1
        for left in range(strides - 1, -1, -1):
            outputs = max(1, width // 2**left)
            layers += [nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.convolutions = nn.Sequential(*layers, nn.Conv2d(inputs, width, 1))
        self.positions = nn.Parameter(torch.empty(1, (size // patch) ** 2, width))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x_BCHW: Tensor) -> Tensor:  # noqa: D102
        if x_BCHW.shape[1:] != (self.in_channels, self.size, self.size):
            expected = (self.in_channels, self.size, self.size)
            raise InputError(f"images of {tuple(x_BCHW.shape[1:])}; this network takes {expected}: resize them")
        return self.convolutions(x_BCHW).flatten(2).transpose(1, 2) + self.positions


class Block(nn.Module):
    """Attention among all tokens, then a hidden layer for each; (B, T, D) to the same shape."""

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads, self.norm_a, self.norm_b = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width))
        for linear in (self.query_key_value, self.project, self.hidden[0], self.hidden[2]):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:  # noqa: D102
        q, k, v = (
            z.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for z in self.query_key_value(self.norm_a(x_BTD)).chunk(3, -1)
        )
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BTD = x_BTD + self.project(attended)
        return x_BTD + self.hidden(self.norm_b(x_BTD))


class Classifier(nn.Module):
    """Norm, mean over the tokens, linear: (B, T, D) to logits."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, num_classes)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:  # noqa: D102
        return self.linear(self.norm(x_BTD).mean(1))


def _body(
    in_channels: int, size: int, patch: int, width: int, depth: int, heads: int, expansion: int, num_classes: int
) -> tuple[nn.Module, list[nn.Module]]:
    """The stem and the blocks."""
    counts = {
        "num_classes": num_classes, "in_channels": in_channels, "size": size, "patch": patch, "width": width,
        "depth": depth, "heads": heads, "expansion": expansion,
    }  # fmt: skip
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"vit: {name} is {value!r}; expected a whole number of at least 1")
    if width % heads:
        raise ConfigError(f"vit: width {width} with {heads} heads; expected a width that the heads divide")
    if patch & (patch - 1) or size % patch:
        raise ConfigError(f"vit: patch {patch} for size {size}; expected a power of two that divides the size")
    return PatchTokens(in_channels, size, patch, width), [Block(width, heads, expansion) for _ in range(depth)]
