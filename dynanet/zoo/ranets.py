"""RANet: sub-networks over rising resolutions, each fused with the one before; easy images leave at a low resolution.

Yang, Han, Chen, Song, Dai, Huang: Resolution Adaptive Networks for Efficient Inference, CVPR 2020,
https://arxiv.org/abs/2003.07326. A stem makes features of every resolution. The first sub-network reads the lowest
resolution and classifies; rows that are not sure go on to the next one, whose first blocks also read, layer by layer,
what the sub-network before made. Layers only append channels, so one tensor per block (two where it shrinks) holds the
features of all its layers: what the next sub-network reads are its first channels.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, check_choice, check_sizes
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.nets.blocks import conv_bn_relu, resized
from dynanet.nets.multiscale import HEADS, ConvExit, finest_scale, grow_conv

Features = tuple[Tensor, ...]  # of one block: (all layers,), or (all but the last, the last) where that one shrinks
State = tuple[tuple[Tensor, ...], tuple[Features, ...], tuple[Tensor, ...]]
"""What travels between exits: stem features still unread (lowest resolution first), features of this sub-network's
blocks for the next one, and what the exit reads where that is not the newest of these."""


@architecture
def ranet(
    *,
    num_classes: int,
    in_channels: int = 3,
    blocks: int = 2,
    block_step: int = 2,
    step: int = 4,
    step_mode: Literal["even", "lin_grow"] = "even",
    channels: int = 16,
    growth: int = 6,
    scales: Sequence[int] = (1, 2, 3),
    growth_factors: Sequence[int] = (4, 2, 1),
    bottleneck_factors: Sequence[int] = (4, 2, 1),
    compress: float = 0.25,
    reduction: float = 0.5,
    head: Literal["cifar", "imagenet"] = "cifar",
) -> EarlyExit:
    """RANet; the defaults are those of the authors' command line, and images may have any size.

    `ranet_cifar` and `ranet_imagenet` are the settings that the authors ran.

    Args:
        num_classes: width of every exit's logits.
        in_channels: channels (bands) of the input.
        blocks: blocks of the first sub-network, each followed by an exit.
        block_step: how many blocks each sub-network has more than the one before; these have exits, the others fuse.
        step: layers of the first block.
        step_mode: with "even" all blocks have `step` layers, with "lin_grow" ("lg") block i has step * i.
        channels: width of the stem, per unit of growth factor.
        growth: channels that a layer adds, per unit of growth factor.
        scales: one per sub-network, its resolution: 1 for the lowest, 2 for twice that size.
        growth_factors: one per sub-network, lowest resolution first: it has that many times the channels.
        bottleneck_factors: one per sub-network: a 1x1 convolution first narrows to at most this many times the new
            channels.
        compress: share of a fusing layer's new channels that come from the sub-network before.
        reduction: share of the channels that transitions keep.
        head: "cifar": 3x3 stem, exits of 128 channels; "imagenet": 7x7 stem with stride 2 and pooling, exits as wide
            as the features.

    Returns:
        An EarlyExit of blocks + block_step * (sub-networks - 1) steps; logits are (B, num_classes).

    Raises:
        ConfigError: a value out of range, an unknown mode, or lists of unequal length.

    Example:
        >>> model = ranet(num_classes=10, step=2, channels=4, growth=4)
        >>> [tuple(logits.shape) for logits in model.answers(torch.zeros(2, 3, 16, 16))]
        [(2, 10), (2, 10), (2, 10), (2, 10), (2, 10), (2, 10)]
    """
    check_choice("step_mode", step_mode, ("even", "lin_grow"))
    check_choice("head", head, HEADS)
    check_sizes(num_classes=num_classes, in_channels=in_channels, blocks=blocks, block_step=block_step, step=step)
    check_sizes(channels=channels, growth=growth)
    _check_lists(growth, scales, growth_factors, bottleneck_factors, compress)
    if type(reduction) not in (int, float) or not 0 < reduction <= 1:
        raise ConfigError(f"reduction must be the share of channels kept, above 0 and up to 1, got {reduction!r}")
    stem: Stem | None = Stem(in_channels, [channels * f for f in growth_factors], scales, head)
    ends = [0] + [blocks + block_step * i for i in range(len(scales))]  # ends[i]: how many blocks sub-network i fuses
    stages: list[nn.Module] = []
    exits: list[nn.Module] = []
    lower: list[list[int]] = []
    for i, factor in enumerate(growth_factors):
        sub = _SubNetwork(
            ends=ends[: i + 2], scale=scales[i], width=channels * factor, gained=growth * factor, step=step,
            grows=step_mode == "lin_grow", factors=(bottleneck_factors[i], bottleneck_factors[i - 1]),
            compress=compress, reduction=reduction,
        )  # fmt: skip
        last = i == len(scales) - 1
        for place, made in sub.build(lower):
            stages.append(Stage(made, stem, i, place, opens=place == 0, remembers=not last))
            exits.append(ConvExit(sub.width, 128 if head == "cifar" else sub.width, num_classes, _newest))
            stem = None
        lower = sub.widths
    return EarlyExit(stages, exits)


@architecture
def ranet_cifar(
    *, num_classes: int, in_channels: int = 3, variant: Literal["even", "model1", "model2", "model3"] = "even"
) -> EarlyExit:
    """The authors' CIFAR nets: their script's ("even", four sub-networks of 4 layers a block), and three that grow."""
    settings: dict[str, tuple[int, Literal["even", "lin_grow"], tuple[int, ...], tuple[int, ...]]] = {
        "even": (4, "even", (1, 2, 3, 3), (4, 2, 1, 1)),
        "model1": (2, "lin_grow", (1, 2, 3), (4, 2, 1)),
        "model2": (2, "lin_grow", (1, 2, 2, 3), (4, 2, 2, 1)),
        "model3": (2, "lin_grow", (1, 2, 3, 3), (4, 2, 1, 1)),
    }
    check_choice("variant", variant, settings)
    step, mode, scales, factors = settings[variant]
    return ranet(
        num_classes=num_classes, in_channels=in_channels, step=step, step_mode=mode, scales=scales,
        growth_factors=factors, bottleneck_factors=factors,
    )  # fmt: skip


@architecture
def ranet_imagenet(
    *, num_classes: int = 1000, in_channels: int = 3, variant: Literal["model1", "model2", "script"] = "model2"
) -> EarlyExit:
    """The authors' ImageNet nets: 32 ("model1") or 64 channels ("model2"), and the narrower one of their script."""
    settings: dict[str, tuple[int, tuple[int, ...]]] = {
        "model1": (32, (4, 2, 2, 1)),
        "model2": (64, (4, 2, 2, 1)),
        "script": (16, (4, 2, 1, 1)),
    }
    check_choice("variant", variant, settings)
    channels, factors = settings[variant]
    return ranet(
        num_classes=num_classes, in_channels=in_channels, step=8, channels=channels, growth=16, scales=(1, 2, 3, 4),
        growth_factors=factors, bottleneck_factors=factors, head="imagenet",
    )  # fmt: skip


class Stem(nn.Module):
    """The first features of every sub-network, each computed from the next finer one.

    The stride is 2 where their scales differ. All lists here have the lowest resolution first.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], scales: Sequence[int], head: str) -> None:
        super().__init__()
        fine_to_coarse = list(widths)[::-1]
        resolutions = list(scales)[::-1]
        self.scales = nn.ModuleList([finest_scale(in_channels, fine_to_coarse[0], head)])
        for i in range(1, len(resolutions)):
            stride = 1 if resolutions[i] == resolutions[i - 1] else 2
            self.scales.append(conv_bn_relu(fine_to_coarse[i - 1], fine_to_coarse[i], 3, stride))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) to one tensor per sub-network."""
        features: list[Tensor] = []
        for scale in self.scales:
            x = scale(x)
            features.append(x)
        return tuple(features[::-1])


class Stage(nn.Module):
    """The blocks up to one exit.

    Args:
        blocks: fusing ones first, then one that is not.
        stem: of the first stage.
        subnet: the sub-network that it belongs to, from 0.
        place: the number of its first block there, from 0.
        opens: whether a sub-network begins here.
        remembers: whether a later sub-network reads these blocks.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], stem: Stem | None, subnet: int, place: int, *, opens: bool, remembers: bool
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.subnet = subnet
        self.place = place
        self.opens = opens
        self.remembers = remembers
        end = blocks[-1]
        assert isinstance(end, Dense), "an exit follows a block that does not fuse"
        self.held = end.trans is None  # its end is the last of its features: held once

    def forward(self, state: Tensor | State) -> State:
        """The images (with a stem) or the state of the stage before, to a state."""
        unread, own, newest = state if self.stem is None else (self.stem(state), (), ())
        lower: tuple[Features, ...] = ()
        if self.opens:
            x = unread[0]
            unread = unread[1:]
            lower = own  # the sub-network before, whose blocks the fusing ones read
            own = ()
        else:
            x = _newest((unread, own, newest))
        for i, block in enumerate(self.blocks):
            x, features = block(x, lower[i]) if isinstance(block, Fuse) else block(x)
            own = (*own, features)
        if not self.remembers:
            return unread, (), (x,)
        return unread, own, () if self.held else (x,)


class Dense(nn.Module):
    """A block of layers that each append channels. Arguments as in `Fuse`."""

    def __init__(self, widths: Sequence[int], factor: int, kept: float | None) -> None:
        super().__init__()
        gained = widths[1] - widths[0]
        self.layers = nn.ModuleList(Grow(width, gained, factor) for width in widths[:-1])
        self.trans, self.width = _transition(widths[-1], kept)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        """(B, widths[0], H, W) to the block's end (B, width, H, W) and the features of all its layers."""
        for layer in self.layers:
            x = layer(x)
        return (x if self.trans is None else self.trans(x)), (x,)


class Fuse(nn.Module):
    """A block whose layers also read those of the block below, in the sub-network before.

    Args:
        widths: channels before each layer, and after the last.
        lower: the same of the block below.
        factors: how many times the new channels 1x1 convolutions narrow to, here and on what comes from below.
        compress: share of new channels that come from below.
        kept: share of the channels that a transition keeps at the end; None for no transition.
        shrinks: whether the last layer halves the size.
    """

    def __init__(
        self,
        widths: Sequence[int],
        lower: Sequence[int],
        factors: tuple[int, int],
        compress: float,
        kept: float | None,
        *,
        shrinks: bool,
    ) -> None:
        super().__init__()
        depth = len(widths) - 1
        gained = widths[1] - widths[0]
        up = math.floor(gained * compress)
        self.layers = nn.ModuleList(
            GrowFused(widths[i], gained - up, lower[i], up, factors, stride=2 if shrinks and i == depth - 1 else 1)
            for i in range(depth)
        )
        last = math.floor(widths[-1] * compress)
        self.last = conv_bn_relu(lower[-1], last, 1)
        self.trans, self.width = _transition(widths[-1] + last, kept)
        self.shrinks = shrinks
        self.lower = tuple(lower)

    def forward(self, x: Tensor, below: Features) -> tuple[Tensor, Features]:
        """(B, widths[0], H, W) and the features of the block below to the block's end and its features."""
        before = x
        for layer, width in zip(self.layers, self.lower, strict=False):
            before, x = x, layer(x, below[0][:, :width])
        features = (before, x) if self.shrinks else (x,)
        x = torch.cat([x, _fitted(self.last(below[-1]), like=x)], 1)
        return (x if self.trans is None else self.trans(x)), features


class Grow(nn.Module):
    """Appends `gained` channels."""

    def __init__(self, width: int, gained: int, factor: int) -> None:
        super().__init__()
        self.normal = grow_conv(width, gained, factor)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) to (B, width + gained, H, W)."""
        return torch.cat([x, self.normal(x)], 1)


class GrowFused(nn.Module):
    """Appends `up` channels from below, resized to fit, and `gained` of its own; with stride 2 x is resized as well."""

    def __init__(self, width: int, gained: int, lower: int, up: int, factors: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.up = grow_conv(lower, up, factors[1])
        self.normal = grow_conv(width, gained, factors[0], stride)

    def forward(self, x: Tensor, below: Tensor) -> Tensor:
        """(B, width, H, W) and (B, lower, h, w) to (B, width + up + gained, H', W')."""
        new = self.normal(x)
        return torch.cat([_fitted(x, like=new), _fitted(self.up(below), like=new), new], 1)


@dataclass
class _SubNetwork:
    """Builds the blocks of one sub-network by the paper's rules.

    Attributes:
        ends: how many blocks each sub-network has, up to this one; 0 comes first.
        scale: its resolution, 1 for the lowest.
        width: channels so far, at first those of the stem.
        gained: channels that a layer adds.
        step: layers of the first block.
        grows: whether block n has n times as many.
        factors: bottleneck factors, here and in the sub-network before.
        compress: share of new channels that come from the sub-network before.
        reduction: share of the channels that a transition keeps.
    """

    ends: Sequence[int]
    scale: int
    width: int
    gained: int
    step: int
    grows: bool
    factors: tuple[int, int]
    compress: float
    reduction: float

    def __post_init__(self) -> None:
        self.widths: list[list[int]] = []  # per block: its channels before each layer, and after the last

    def build(self, lower: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[nn.Module]]]:
        """Per exit, the number of its first block, from 0, and its blocks.

        `lower` is the `widths` of the sub-network before, whose blocks the first ones here read.
        """
        fused = self.ends[-2]
        waiting: list[nn.Module] = []
        for n in range(1, self.ends[-1] + 1):
            block = self._block(n, lower[n - 1] if n <= fused else None)
            self.width = block.width
            waiting.append(block)
            if n > fused:
                yield n - len(waiting), waiting
                waiting = []

    def _block(self, n: int, lower: Sequence[int] | None) -> "Dense | Fuse":
        depth = self.step * n if self.grows else self.step
        widths = [self.width + self.gained * layer for layer in range(depth + 1)]
        self.widths.append(widths)
        kept = self.reduction if n in self._narrowing() else None
        if lower is None:
            return Dense(widths, self.factors[0], kept)
        return Fuse(widths, lower, self.factors, self.compress, kept, shrinks=n in self._shrinking())

    def _shrinking(self) -> Sequence[int]:
        """Blocks that halve the size: the last ones of the lower sub-networks, one per scale beyond the lowest."""
        return self.ends[:-1][-(self.scale - 1) :]  # all of them where scale is 1, as in the authors' code

    def _narrowing(self) -> Sequence[int]:
        """Blocks with a transition at their end: they cut the depth into `scale` parts."""
        return [math.floor((j + 1) * self.ends[-1] / self.scale) for j in range(self.scale - 1)]


def _newest(state: State) -> Tensor:
    """The end of the last block that ran; held once, so that rows that go on are gathered once."""
    return state[2][0] if state[2] else state[1][-1][-1]


def _fitted(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape[-2:] == like.shape[-2:] else resized(x, like, align_corners=True)


def _transition(width: int, kept: float | None) -> tuple[nn.Sequential | None, int]:
    """The 1x1 convolution at a block's end, if any, and the width after it."""
    if kept is None:
        return None, width
    narrow = math.floor(kept * width)
    check_sizes(channels_after_reduction=narrow)
    return conv_bn_relu(width, narrow, 1), narrow


def _check_lists(
    growth: int, scales: Sequence[int], factors: Sequence[int], bottlenecks: Sequence[int], compress: float
) -> None:
    if not scales or not len(scales) == len(factors) == len(bottlenecks):
        raise ConfigError(
            f"{len(scales)} scales, {len(factors)} growth_factors and {len(bottlenecks)} bottleneck_factors; "
            f"expected one of each per sub-network"
        )
    check_sizes(scales=scales, growth_factors=factors, bottleneck_factors=bottlenecks)
    if type(compress) not in (int, float) or not 0 < compress < 1:
        raise ConfigError(f"compress must be a share of the new channels between 0 and 1, got {compress!r}")
    if any(growth * factor * compress < 1 for factor in factors[1:]):
        raise ConfigError(
            f"growth {growth} with growth_factors {tuple(factors)} and compress {compress}; expected "
            f"growth * factor * compress of at least 1 beyond the first sub-network, for what comes from below"
        )
