"""MSDNet: features at several scales from the first layer on, and a classifier after every block.

Huang, Chen, Li, Wu, van der Maaten, Weinberger: Multi-Scale Dense Networks for Resource Efficient Image Classification,
ICLR 2018, https://arxiv.org/abs/1703.09844. Classifiers need coarse features and late layers need fine ones; so every
layer keeps both, densely connected, and drops the finest scale as it gets deeper. What travels between stages is a
tuple of tensors, finest scale first, each half the size of the one before.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError
from dynanet.mechanisms.early_exit import EarlyExit


@architecture
def msdnet(
    *,
    num_classes: int,
    in_channels: int = 3,
    blocks: int = 5,
    base: int = 1,
    step: int = 1,
    step_mode: Literal["even", "lin_grow"] = "lin_grow",
    channels: int = 16,
    growth: int = 6,
    growth_factors: Sequence[int] = (1, 2, 4),
    bottleneck_factors: Sequence[int] = (1, 2, 4),
    prune: Literal["max", "min"] = "max",
    bottleneck: bool = True,
    reduction: float = 0.5,
    head: Literal["cifar", "imagenet"] = "cifar",
) -> EarlyExit:
    """MSDNet with one exit per block; the defaults are the authors' CIFAR net for budgeted batches.

    `msdnet_anytime` and `msdnet_imagenet` are the authors' other settings. Images may have any size; the authors used
    32 x 32 with three scales and 224 x 224 with four.

    Args:
        num_classes: width of every exit's logits.
        in_channels: channels (bands) of the input.
        blocks: number of blocks, each followed by an exit.
        base: layers of the first block.
        step: with step_mode "even" every later block has `step` layers, with "lin_grow" block i has step * i + 1.
        step_mode: see `step`.
        channels: width of the stem, per unit of growth factor.
        growth: channels that a layer adds, per unit of growth factor.
        growth_factors: one per scale, finest first: scale s has growth_factors[s] times the channels. Their number is
            the number of scales.
        bottleneck_factors: one per scale: a 1x1 convolution first narrows to at most this many times the new channels.
        prune: when the finest scale is dropped. "max": at equal intervals over the depth; "min": in the last layers,
            one per layer.
        bottleneck: False leaves the 1x1 convolutions out.
        reduction: share of the channels that the transitions keep (one after each dropped scale with "max", after a
            third and two thirds of the layers with "min"); 0 for no transitions.
        head: "cifar": 3x3 stem, exits of 128 channels; "imagenet": 7x7 stem with stride 2 and pooling, exits as wide
            as the features.

    Returns:
        An EarlyExit of `blocks` steps; logits are (B, num_classes).

    Raises:
        ConfigError: a value out of range, an unknown mode, or factors of unequal number.

    Example:
        >>> model = msdnet(num_classes=10, blocks=3)
        >>> [tuple(logits.shape) for logits in model.answers(torch.zeros(2, 3, 32, 32))]
        [(2, 10), (2, 10), (2, 10)]
    """
    _check_choices(step_mode=step_mode, prune=prune, head=head)
    _check_counts(num_classes=num_classes, in_channels=in_channels, blocks=blocks, base=base, channels=channels)
    _check_counts(growth=growth)
    _check_factors(growth, growth_factors, bottleneck_factors)
    if not isinstance(reduction, int | float) or not 0 <= reduction <= 1:
        raise ConfigError(f"msdnet: reduction is {reduction!r}; expected the share of channels kept, from 0 to 1")

    depths = [base] + [step if step_mode == "even" else step * i + 1 for i in range(1, blocks)]
    if not isinstance(step, int) or min(depths) < 1:
        raise ConfigError(f"msdnet: step {step} gives blocks of {depths} layers; expected at least one layer in each")
    total, scales = sum(depths), len(growth_factors)
    if prune == "min" and total < scales - 1:
        raise ConfigError(
            f"msdnet: prune='min' drops a scale per layer and has {total} layers for {scales} scales; "
            f"expected at least {scales - 1} layers, or prune='max'"
        )
    inner = tuple(bottleneck_factors) if bottleneck else (None,) * scales
    width, done = channels, 0  # width: channels of every scale, per unit of its growth factor
    stages: list[nn.Module] = []
    exits: list[nn.Module] = []
    for depth in depths:
        layers: list[nn.Module] = [] if stages else [Stem(in_channels, [width * f for f in growth_factors], head)]
        for n in range(done + 1, done + depth + 1):
            entering, leaving = _scales_at(n, total, scales, prune)
            layers.append(Layer(width, growth, growth_factors, inner, entering, leaving))
            width += growth
            narrows = entering > leaving if prune == "max" else n in (total // 3, 2 * total // 3)
            if narrows and reduction > 0:
                kept = math.floor(reduction * width)
                _check_counts(channels_after_reduction=kept)
                layers.append(Transition(width, kept, growth_factors[scales - leaving :]))
                width = kept
        done += depth
        features = width * growth_factors[-1]
        stages.append(nn.Sequential(*layers))
        exits.append(Exit(features, 128 if head == "cifar" else features, num_classes))
    return EarlyExit(stages, exits)


@architecture
def msdnet_anytime(*, num_classes: int, in_channels: int = 3, blocks: int = 7) -> EarlyExit:
    """The authors' CIFAR net for anytime prediction: 4 layers, then 2 per block (`blocks` 7 in PyTorch, 10 in Lua)."""
    return msdnet(
        num_classes=num_classes, in_channels=in_channels, blocks=blocks, base=4, step=2, step_mode="even", channels=16
    )


@architecture
def msdnet_imagenet(*, num_classes: int = 1000, in_channels: int = 3, step: int = 4) -> EarlyExit:
    """The authors' ImageNet nets: five blocks of `step` layers over four scales; they published step 4, 6 and 7."""
    return msdnet(
        num_classes=num_classes,
        in_channels=in_channels,
        blocks=5,
        base=step,
        step=step,
        step_mode="even",
        channels=32,
        growth=16,
        growth_factors=(1, 2, 4, 4),
        bottleneck_factors=(1, 2, 4, 4),
        head="imagenet",
    )


class Stem(nn.Module):
    """The first features of every scale, each computed from the next finer one: (B, C, H, W) -> a tuple of tensors."""

    def __init__(self, in_channels: int, widths: Sequence[int], head: str) -> None:
        super().__init__()
        if head == "cifar":
            finest = _conv_bn_relu(in_channels, widths[0], kernel=3)
        else:
            finest = nn.Sequential(
                _conv(in_channels, widths[0], kernel=7, stride=2, bias=True),  # the authors have a bias here only
                nn.BatchNorm2d(widths[0]),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        coarser = [_conv_bn_relu(a, b, kernel=3, stride=2) for a, b in zip(widths, widths[1:], strict=False)]
        self.scales = nn.ModuleList([finest, *coarser])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        features = []
        for scale in self.scales:
            x = scale(x)
            features.append(x)
        return tuple(features)


class Layer(nn.Module):
    """Adds features to the `leaving` coarsest scales of `entering` ones; the others end here."""

    def __init__(
        self,
        width: int,
        growth: int,
        growth_factors: Sequence[int],
        bottleneck_factors: Sequence[int | None],
        entering: int,
        leaving: int,
    ) -> None:
        super().__init__()
        scales = len(growth_factors)
        self.scales = nn.ModuleList()
        for s in range(scales - leaving, scales):
            has_finer = s > scales - entering
            grow = Grow(
                width * growth_factors[s],
                growth * growth_factors[s],
                bottleneck_factors[s],
                finer_width=width * growth_factors[s - 1] if has_finer else None,
                finer_factor=bottleneck_factors[s - 1] if has_finer else None,
            )
            self.scales.append(grow)

    def forward(self, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: D102
        first = len(xs) - len(self.scales)
        return tuple(grow(xs[i], xs[i - 1] if i else None) for i, grow in enumerate(self.scales, start=first))


class Grow(nn.Module):
    """One scale of a layer: what it has, half its new features from the next finer scale, the others from itself."""

    def __init__(
        self,
        width: int,
        growth: int,
        factor: int | None,
        finer_width: int | None = None,
        finer_factor: int | None = None,
    ) -> None:
        super().__init__()
        from_finer = 0 if finer_width is None else growth // 2
        self.down = None if finer_width is None else _grow_conv(finer_width, from_finer, finer_factor, stride=2)
        self.normal = _grow_conv(width, growth - from_finer, factor, stride=1)

    def forward(self, x: Tensor, finer: Tensor | None) -> Tensor:  # noqa: D102
        if self.down is None:
            return torch.cat([x, self.normal(x)], 1)
        return torch.cat([x, self.down(finer), self.normal(x)], 1)


class Transition(nn.Module):
    """Narrows every scale by a 1x1 convolution, from `width` to `kept` channels per unit of growth factor."""

    def __init__(self, width: int, kept: int, growth_factors: Sequence[int]) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(_conv_bn_relu(width * f, kept * f, kernel=1) for f in growth_factors)

    def forward(self, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: D102
        return tuple(narrow(x) for narrow, x in zip(self.narrow, xs, strict=True))


class Exit(nn.Module):
    """The classifier of a block, on the coarsest scale: two strided convolutions, average, linear -> (B, classes)."""

    def __init__(self, width: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            _conv_bn_relu(width, hidden, kernel=3, stride=2), _conv_bn_relu(hidden, hidden, kernel=3, stride=2)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)  # the authors' 2x2 pooling at their image sizes, and right at any other
        self.linear = nn.Linear(hidden, num_classes)
        nn.init.zeros_(self.linear.bias)

    def forward(self, xs: tuple[Tensor, ...]) -> Tensor:  # noqa: D102
        return self.linear(self.pool(self.convs(xs[-1])).flatten(1))


def _scales_at(n: int, total: int, scales: int, prune: str) -> tuple[int, int]:
    """How many scales enter and leave layer n of `total`, counted from 1."""
    if prune == "min":
        return min(scales, total - n + 2), min(scales, total - n + 1)
    interval = math.ceil(total / scales)
    return scales - max(0, n - 2) // interval, scales - (n - 1) // interval


def _grow_conv(inputs: int, outputs: int, factor: int | None, stride: int) -> nn.Sequential:
    """[1x1 convolution to at most factor * outputs channels, then] a 3x3 one; each with its norm and ReLU."""
    if factor is None:
        return _conv_bn_relu(inputs, outputs, kernel=3, stride=stride)
    hidden = min(inputs, factor * outputs)
    return nn.Sequential(
        *_conv_bn_relu(inputs, hidden, kernel=1), *_conv_bn_relu(hidden, outputs, kernel=3, stride=stride)
    )


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = _conv(inputs, outputs, kernel, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _conv(inputs: int, outputs: int, kernel: int, stride: int, bias: bool) -> nn.Conv2d:
    """He initialisation by fan-out, as in the authors' Lua code; their PyTorch port means to and does not."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _check_choices(*, step_mode: str, prune: str, head: str) -> None:
    known = {"step_mode": ("even", "lin_grow"), "prune": ("max", "min"), "head": ("cifar", "imagenet")}
    for name, value in {"step_mode": step_mode, "prune": prune, "head": head}.items():
        if value not in known[name]:
            raise ConfigError(f"msdnet: {name} is {value!r}; expected {known[name][0]!r} or {known[name][1]!r}")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"msdnet: {name} is {value!r}; expected a whole number of at least 1")


def _check_factors(growth: int, growth_factors: Sequence[int], bottleneck_factors: Sequence[int]) -> None:
    if len(growth_factors) != len(bottleneck_factors) or not len(growth_factors):
        raise ConfigError(
            f"msdnet: {len(growth_factors)} growth_factors {tuple(growth_factors)} and {len(bottleneck_factors)} "
            f"bottleneck_factors {tuple(bottleneck_factors)}; expected one of each per scale"
        )
    for factor in (*growth_factors, *bottleneck_factors):
        _check_counts(factor=factor)
    if any(growth * factor < 2 for factor in growth_factors[1:]):
        raise ConfigError(
            f"msdnet: growth {growth} with growth_factors {tuple(growth_factors)}; expected growth * factor of at "
            f"least 2 beyond the finest scale, where half of it comes from the finer one"
        )
