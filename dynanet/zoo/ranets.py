"""RANet: sub-networks over rising resolutions, each fused with the one before; easy images leave at a low resolution.

Yang, Han, Chen, Song, Dai, Huang: Resolution Adaptive Networks for Efficient Inference, CVPR 2020,
https://arxiv.org/abs/2003.07326. A stem makes features of every resolution. The first sub-network reads the lowest
resolution and classifies; rows that are not sure go on to the next one, whose first blocks also read, layer by layer,
what the sub-network before made. Layers only append channels, so one tensor per block (two where it shrinks) holds the
features of all its layers: what the next sub-network reads are its first channels.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError
from dynanet.mechanisms.early_exit import EarlyExit

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
    _check_choices(step_mode=step_mode, head=head)
    _check_counts(num_classes=num_classes, in_channels=in_channels, blocks=blocks, block_step=block_step, step=step)
    _check_counts(channels=channels, growth=growth)
    _check_lists(growth, scales, growth_factors, bottleneck_factors, compress)
    if type(reduction) not in (int, float) or not 0 < reduction <= 1:
        raise ConfigError(
            f"ranet: reduction is {reduction!r}; expected the share of channels kept, above 0 and up to 1"
        )

    stem = Stem(in_channels, [channels * f for f in growth_factors], scales, head)
    ends = [0] + [blocks + block_step * i for i in range(len(scales))]  # ends[i]: how many blocks sub-network i fuses
    stages: list[nn.Module] = []
    exits: list[nn.Module] = []
    lower: list[list[int]] = []  # per block of the sub-network before: its width before each layer, and at its end
    for i, factor in enumerate(growth_factors):
        width, gained = channels * factor, growth * factor
        shrinks = ends[: i + 1][-(scales[i] - 1) :]  # the authors' rule, also where scales[i] is 1
        narrows = [math.floor((j + 1) * ends[i + 1] / scales[i]) for j in range(scales[i] - 1)]
        own: list[list[int]] = []
        waiting: list[nn.Module] = []
        for n in range(1, ends[i + 1] + 1):
            depth = step if step_mode == "even" else step * n
            widths = [width + gained * layer for layer in range(depth + 1)]
            kept = reduction if n in narrows else None
            block: Dense | Fuse
            if n <= ends[i]:
                factors = (bottleneck_factors[i], bottleneck_factors[i - 1])
                block = Fuse(widths, lower[n - 1], factors, compress, kept, shrinks=n in shrinks)
            else:
                block = Dense(widths, bottleneck_factors[i], kept)
            width = block.width
            own.append(widths)
            waiting.append(block)
            if n > ends[i]:
                first, last = not n - 1 - ends[i], i == len(scales) - 1
                place = n - len(waiting)
                stages.append(Stage(waiting, None if stages else stem, i, place, opens=first, remembers=not last))
                exits.append(Exit(width, 128 if head == "cifar" else width, num_classes))
                waiting = []
        lower = own
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
    if variant not in settings:
        raise ConfigError(f"ranet_cifar: variant is {variant!r}; expected one of {', '.join(settings)}")
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
    if variant not in settings:
        raise ConfigError(f"ranet_imagenet: variant is {variant!r}; expected one of {', '.join(settings)}")
    channels, factors = settings[variant]
    return ranet(
        num_classes=num_classes, in_channels=in_channels, step=8, channels=channels, growth=16, scales=(1, 2, 3, 4),
        growth_factors=factors, bottleneck_factors=factors, head="imagenet",
    )  # fmt: skip


class Stem(nn.Module):
    """The first features of every sub-network: (B, C, H, W) -> a tuple, lowest resolution first, as all lists here.

    Each is computed from the next finer one, with stride 2 where their scales differ.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], scales: Sequence[int], head: str) -> None:
        super().__init__()
        fine_to_coarse, resolutions = list(widths)[::-1], list(scales)[::-1]
        if head == "cifar":
            finest = _conv_bn_relu(in_channels, fine_to_coarse[0], kernel=3)
        else:
            finest = nn.Sequential(
                _conv(in_channels, fine_to_coarse[0], kernel=7, stride=2, bias=True),  # the authors' only bias
                nn.BatchNorm2d(fine_to_coarse[0]),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        self.scales = nn.ModuleList([finest])
        for i in range(1, len(resolutions)):
            stride = 1 if resolutions[i] == resolutions[i - 1] else 2
            self.scales.append(_conv_bn_relu(fine_to_coarse[i - 1], fine_to_coarse[i], kernel=3, stride=stride))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        features: list[Tensor] = []
        for scale in self.scales:
            x = scale(x)
            features.append(x)
        return tuple(features[::-1])


class Stage(nn.Module):
    """The blocks up to one exit: the input (with a stem) or a State -> a State.

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
        self.stem, self.blocks = stem, nn.ModuleList(blocks)
        self.subnet, self.place, self.opens, self.remembers = subnet, place, opens, remembers
        end = blocks[-1]
        assert isinstance(end, Dense), "an exit follows a block that does not fuse"
        self.held = end.trans is None  # its end is the last of its features: held once

    def forward(self, state: Tensor | State) -> State:  # noqa: D102
        unread, own, newest = state if self.stem is None else (self.stem(state), (), ())
        lower: tuple[Features, ...] = ()
        if self.opens:
            x, unread, lower, own = unread[0], unread[1:], own, ()
        else:
            x = _newest((unread, own, newest))
        for i, block in enumerate(self.blocks):
            x, features = block(x, lower[i]) if isinstance(block, Fuse) else block(x)
            own = (*own, features)
        if not self.remembers:
            return unread, (), (x,)
        return unread, own, () if self.held else (x,)


class Dense(nn.Module):
    """A block of layers that each append channels: x -> (its end, the features of all layers). Arguments as `Fuse`."""

    def __init__(self, widths: Sequence[int], factor: int, kept: float | None) -> None:
        super().__init__()
        gained = widths[1] - widths[0]
        self.layers = nn.ModuleList(Grow(width, gained, factor) for width in widths[:-1])
        self.trans, self.width = _transition(widths[-1], kept)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:  # noqa: D102
        for layer in self.layers:
            x = layer(x)
        return (x if self.trans is None else self.trans(x)), (x,)


class Fuse(nn.Module):
    """A block whose layers also read those of the block below: (x, features below) -> (its end, its features).

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
        depth, gained = len(widths) - 1, widths[1] - widths[0]
        up = math.floor(gained * compress)
        self.layers = nn.ModuleList(
            GrowFused(widths[i], gained - up, lower[i], up, factors, stride=2 if shrinks and i == depth - 1 else 1)
            for i in range(depth)
        )
        last = math.floor(widths[-1] * compress)
        self.last = _conv_bn_relu(lower[-1], last, kernel=1)
        self.trans, self.width = _transition(widths[-1] + last, kept)
        self.shrinks, self.lower = shrinks, tuple(lower)

    def forward(self, x: Tensor, below: Features) -> tuple[Tensor, Features]:  # noqa: D102
        before = x
        for layer, width in zip(self.layers, self.lower, strict=False):
            before, x = x, layer(x, below[0][:, :width])
        features = (before, x) if self.shrinks else (x,)
        x = torch.cat([x, _resized(self.last(below[-1]), like=x)], 1)
        return (x if self.trans is None else self.trans(x)), features


class Grow(nn.Module):
    """Appends `gained` channels."""

    def __init__(self, width: int, gained: int, factor: int) -> None:
        super().__init__()
        self.normal = _grow_conv(width, gained, factor)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.cat([x, self.normal(x)], 1)


class GrowFused(nn.Module):
    """Appends `up` channels from below, resized to fit, and `gained` of its own; with stride 2 x is resized as well."""

    def __init__(self, width: int, gained: int, lower: int, up: int, factors: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.up = _grow_conv(lower, up, factors[1])
        self.normal = _grow_conv(width, gained, factors[0], stride)

    def forward(self, x: Tensor, below: Tensor) -> Tensor:  # noqa: D102
        new = self.normal(x)
        return torch.cat([_resized(x, like=new), _resized(self.up(below), like=new), new], 1)


class Exit(nn.Module):
    """Two 3x3 convolutions of stride 2, pooling, a linear layer: State -> logits (B, num_classes)."""

    def __init__(self, width: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            _conv_bn_relu(width, hidden, kernel=3, stride=2), _conv_bn_relu(hidden, hidden, kernel=3, stride=2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)  # the authors' 2x2 pooling at their image sizes, and right at any other
        self.linear = nn.Linear(hidden, num_classes)
        nn.init.zeros_(self.linear.bias)

    def forward(self, state: State) -> Tensor:  # noqa: D102
        return self.linear(self.pool(self.convs(_newest(state))).flatten(1))


def _newest(state: State) -> Tensor:
    """The end of the last block that ran; held once, so that rows that go on are gathered once."""
    return state[2][0] if state[2] else state[1][-1][-1]


def _resized(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return functional.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


def _transition(width: int, kept: float | None) -> tuple[nn.Sequential | None, int]:
    """The 1x1 convolution at a block's end, if any, and the width after it."""
    if kept is None:
        return None, width
    narrow = math.floor(kept * width)
    _check_counts(channels_after_reduction=narrow)
    return _conv_bn_relu(width, narrow, kernel=1), narrow


def _grow_conv(inputs: int, outputs: int, factor: int, stride: int = 1) -> nn.Sequential:
    """1x1 convolution to at most factor * outputs channels, then a 3x3 one; each with its norm and ReLU."""
    hidden = min(inputs, factor * outputs)
    return nn.Sequential(
        *_conv_bn_relu(inputs, hidden, kernel=1), *_conv_bn_relu(hidden, outputs, kernel=3, stride=stride)
    )


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = _conv(inputs, outputs, kernel, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _conv(inputs: int, outputs: int, kernel: int, stride: int, bias: bool) -> nn.Conv2d:
    """He initialisation by fan-out, as the authors have it everywhere but in the stem."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _check_choices(*, step_mode: str, head: str) -> None:
    known = {"step_mode": ("even", "lin_grow"), "head": ("cifar", "imagenet")}
    for name, value in {"step_mode": step_mode, "head": head}.items():
        if value not in known[name]:
            raise ConfigError(f"ranet: {name} is {value!r}; expected {known[name][0]!r} or {known[name][1]!r}")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"ranet: {name} is {value!r}; expected a whole number of at least 1")


def _check_lists(
    growth: int, scales: Sequence[int], factors: Sequence[int], bottlenecks: Sequence[int], compress: float
) -> None:
    if not len(scales) or not len(scales) == len(factors) == len(bottlenecks):
        raise ConfigError(
            f"ranet: {len(scales)} scales, {len(factors)} growth_factors and {len(bottlenecks)} "
            f"bottleneck_factors; expected one of each per sub-network"
        )
    for scale in scales:
        _check_counts(scale=scale)
    for factor in (*factors, *bottlenecks):
        _check_counts(factor=factor)
    if type(compress) not in (int, float) or not 0 < compress < 1:
        raise ConfigError(f"ranet: compress is {compress!r}; expected a share of the new channels between 0 and 1")
    if any(growth * factor * compress < 1 for factor in factors[1:]):
        raise ConfigError(
            f"ranet: growth {growth} with growth_factors {tuple(factors)} and compress {compress}; expected "
            f"growth * factor * compress of at least 1 beyond the first sub-network, for what comes from below"
        )
