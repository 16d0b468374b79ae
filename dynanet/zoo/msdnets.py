"""MSDNet: features at several scales from the first layer on, and a classifier after every block.

Huang, Chen, Li, Wu, van der Maaten, Weinberger: Multi-Scale Dense Networks for Resource Efficient Image Classification,
ICLR 2018, https://arxiv.org/abs/1703.09844. Classifiers need coarse features and late layers need fine ones; so every
layer keeps both, densely connected, and drops the finest scale as it gets deeper. What travels between stages is a
tuple of tensors, finest scale first, each half the size of the one before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, check_choice, check_sizes
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.nets.blocks import conv_bn_relu
from dynanet.nets.multiscale import HEADS, ConvExit, finest_scale, grow_conv


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
    check_choice("step_mode", step_mode, ("even", "lin_grow"))
    check_choice("prune", prune, ("max", "min"))
    check_choice("head", head, HEADS)
    check_sizes(num_classes=num_classes, in_channels=in_channels, blocks=blocks, base=base)
    check_sizes(channels=channels, growth=growth)
    _check_factors(growth, growth_factors, bottleneck_factors)
    if not isinstance(reduction, int | float) or not 0 <= reduction <= 1:
        raise ConfigError(f"reduction must be the share of channels kept, from 0 to 1, got {reduction!r}")
    depths = _depths(blocks, base, step, step_mode)
    inner = tuple(bottleneck_factors) if bottleneck else (None,) * len(growth_factors)
    layers = _Layers(channels, growth, growth_factors, inner, prune, reduction, sum(depths))

    stages: list[nn.Module] = []
    exits: list[nn.Module] = []
    done = 0
    for depth in depths:
        stage: list[nn.Module] = [] if stages else [Stem(in_channels, [channels * f for f in growth_factors], head)]
        for n in range(done + 1, done + depth + 1):
            stage += layers.build(n)
        done += depth
        features = layers.width * growth_factors[-1]
        stages.append(nn.Sequential(*stage))
        exits.append(ConvExit(features, 128 if head == "cifar" else features, num_classes, _coarsest))
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
    """The first features of every scale, each computed from the next finer one."""

    def __init__(self, in_channels: int, widths: Sequence[int], head: str) -> None:
        super().__init__()
        finest = finest_scale(in_channels, widths[0], head)
        coarser = [conv_bn_relu(a, b, 3, 2) for a, b in pairwise(widths)]
        self.scales = nn.ModuleList([finest, *coarser])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) to one tensor (B, widths[s], H_s, W_s) per scale s, finest first."""
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

    def forward(self, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One tensor per entering scale to one per leaving scale, each with `growth * factor` more channels."""
        first = len(xs) - len(self.scales)
        return tuple(grow(xs[i], xs[i - 1] if i else None) for i, grow in enumerate(self.scales, start=first))


class Grow(nn.Module):
    """One scale of a layer: appends new features, half of them computed from the next finer scale."""

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
        self.down = None if finer_width is None else grow_conv(finer_width, from_finer, finer_factor, stride=2)
        self.normal = grow_conv(width, growth - from_finer, factor)

    def forward(self, x: Tensor, finer: Tensor | None) -> Tensor:
        """(B, width, H, W) and (B, finer_width, 2 H, 2 W) to (B, width + growth, H, W)."""
        if self.down is None:
            return torch.cat([x, self.normal(x)], 1)
        return torch.cat([x, self.down(finer), self.normal(x)], 1)


class Transition(nn.Module):
    """Narrows every scale by a 1x1 convolution, from `width` to `kept` channels per unit of growth factor."""

    def __init__(self, width: int, kept: int, growth_factors: Sequence[int]) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(conv_bn_relu(width * f, kept * f, 1) for f in growth_factors)

    def forward(self, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One tensor per scale to as many, narrower ones."""
        return tuple(narrow(x) for narrow, x in zip(self.narrow, xs, strict=True))


@dataclass
class _Layers:
    """Builds the layers in order. `width` is the channels of every scale so far, per unit of its growth factor."""

    width: int
    growth: int
    growth_factors: Sequence[int]
    bottleneck_factors: Sequence[int | None]
    prune: str
    reduction: float
    total: int

    def __post_init__(self) -> None:
        scales = len(self.growth_factors)
        if self.prune == "min" and self.total < scales - 1:
            raise ConfigError(
                f"prune='min' drops a scale per layer and has {self.total} layers for {scales} scales; "
                f"expected at least {scales - 1} layers, or prune='max'"
            )

    def build(self, n: int) -> list[nn.Module]:
        """Layer n, counted from 1, and the transition after it, if there is one."""
        entering, leaving = self.scales_at(n)
        built: list[nn.Module] = [
            Layer(self.width, self.growth, self.growth_factors, self.bottleneck_factors, entering, leaving)
        ]
        self.width += self.growth
        if self.reduction > 0 and self.narrows(n):
            kept = math.floor(self.reduction * self.width)
            check_sizes(channels_after_reduction=kept)
            built.append(Transition(self.width, kept, self.growth_factors[-leaving:]))
            self.width = kept
        return built

    def scales_at(self, n: int) -> tuple[int, int]:
        """How many scales enter and leave layer n (section 4, "Network reduction")."""
        scales = len(self.growth_factors)
        if self.prune == "min":
            return min(scales, self.total - n + 2), min(scales, self.total - n + 1)
        interval = math.ceil(self.total / scales)
        return scales - max(0, n - 2) // interval, scales - (n - 1) // interval

    def narrows(self, n: int) -> bool:
        """Whether a transition follows layer n: where a scale was dropped, or at a third and two thirds."""
        if self.prune == "min":
            return n in (self.total // 3, 2 * self.total // 3)
        entering, leaving = self.scales_at(n)
        return entering > leaving


def _depths(blocks: int, base: int, step: int, step_mode: str) -> list[int]:
    """Layers of every block."""
    depths = [base] + [step if step_mode == "even" else step * i + 1 for i in range(1, blocks)]
    if not isinstance(step, int) or min(depths) < 1:
        raise ConfigError(f"step {step} gives blocks of {depths} layers; expected at least one layer in each")
    return depths


def _coarsest(xs: tuple[Tensor, ...]) -> Tensor:
    """What an exit reads."""
    return xs[-1]


def _check_factors(growth: int, growth_factors: Sequence[int], bottleneck_factors: Sequence[int]) -> None:
    if len(growth_factors) != len(bottleneck_factors) or not growth_factors:
        raise ConfigError(
            f"{len(growth_factors)} growth_factors {tuple(growth_factors)} and {len(bottleneck_factors)} "
            f"bottleneck_factors {tuple(bottleneck_factors)}; expected one of each per scale"
        )
    check_sizes(growth_factors=growth_factors, bottleneck_factors=bottleneck_factors)
    if any(growth * factor < 2 for factor in growth_factors[1:]):
        raise ConfigError(
            f"growth {growth} with growth_factors {tuple(growth_factors)}; expected growth * factor of at least 2 "
            f"beyond the finest scale, where half of it comes from the finer one"
        )
