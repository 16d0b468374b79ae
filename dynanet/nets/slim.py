"""Layers that run at several widths with shared weights: width u uses the first channels of each."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynanet.core.errors import ConfigError, StructureError, check_sizes


class Slim(nn.Module, ABC):
    """A module that runs at several widths: `module(x, u)` is width u, counted from the narrowest.

    Attributes:
        widths: number of widths.
    """

    widths: int

    @abstractmethod
    def forward(self, x: Tensor, u: int) -> Tensor:
        """The output at width u, (B, ...) to (B, ...)."""

    @abstractmethod
    def at(self, u: int) -> nn.Module:
        """Width u as a plain module with its own weights, to deploy."""


class SlimConv2d(Slim):
    """A convolution without bias whose width u is the first rows and columns of its weights (arXiv:1812.08928).

    Args:
        inputs: input channels at every width, ascending.
        outputs: output channels at every width, ascending; equal numbers for a layer of one width.
        kernel: side of the kernel, odd; zeros pad it.
        stride: of the convolution.
        depthwise: one kernel per channel.

    Raises:
        ConfigError: channels below 1 or descending, unequal numbers of widths, or an even kernel.
    """

    def __init__(
        self, inputs: Sequence[int], outputs: Sequence[int], kernel: int, stride: int = 1, *, depthwise: bool = False
    ) -> None:
        super().__init__()
        self.inputs = _channels("inputs", inputs)
        self.outputs = _channels("outputs", outputs)
        if len(inputs) != len(outputs) or (depthwise and self.inputs != self.outputs):
            raise ConfigError(
                f"a slimmable convolution has {self.inputs} input and {self.outputs} output channels; give one number "
                f"in and one out for every width{', equal ones as it is depthwise' if depthwise else ''}"
            )
        if kernel < 1 or kernel % 2 == 0:
            raise ConfigError(f"kernel must be odd, got {kernel}")
        self.kernel = kernel
        self.stride = stride
        self.depthwise = depthwise
        self.widths = len(self.outputs)
        self.weight = nn.Parameter(torch.empty(outputs[-1], 1 if depthwise else inputs[-1], kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out" if not depthwise else "fan_in", nonlinearity="relu")

    def forward(self, x: Tensor, u: int) -> Tensor:
        """(B, inputs[u], H, W) to (B, outputs[u], H', W')."""
        return F.conv2d(x, self._slice(u), None, self.stride, self.kernel // 2, 1, self._groups(u))

    def at(self, u: int) -> nn.Conv2d:
        """Width u as a plain convolution."""
        conv = nn.Conv2d(
            *(self.inputs[u], self.outputs[u], self.kernel, self.stride, self.kernel // 2),
            groups=self._groups(u),
            bias=False,
        ).to(self.weight)
        conv.weight = nn.Parameter(self._slice(u).detach().clone(memory_format=torch.contiguous_format))
        return conv

    def _slice(self, u: int) -> Tensor:
        return self.weight[: self.outputs[u], : 1 if self.depthwise else self.inputs[u]]

    def _groups(self, u: int) -> int:
        return self.outputs[u] if self.depthwise else 1


class SlimBatchNorm2d(Slim):
    """A batch norm with separate statistics for every width (switchable batch norm, arXiv:1812.08928, section 3.2).

    One norm would mix statistics that differ. With `shared`, only statistics are separate and the widths share scale
    and shift, as in US-Nets (arXiv:1903.05134); `train.recalibrate_batchnorm` refreshes either.

    Args:
        channels: at every width.
        shared: one scale and shift for all widths.
    """

    def __init__(self, channels: Sequence[int], *, shared: bool = False) -> None:
        super().__init__()
        self.channels = _channels("channels", channels)
        self.widths = len(channels)
        self.shared = shared
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=not shared) for c in channels)
        self.weight = nn.Parameter(torch.ones(channels[-1])) if shared else None
        self.bias = nn.Parameter(torch.zeros(channels[-1])) if shared else None

    def forward(self, x: Tensor, u: int) -> Tensor:
        """(B, channels[u], H, W) to the same shape."""
        x = self.norms[u](x)
        if self.weight is None or self.bias is None:
            return x
        return x * self.weight[: self.channels[u], None, None] + self.bias[: self.channels[u], None, None]

    def at(self, u: int) -> nn.BatchNorm2d:
        """Width u as a plain batch norm."""
        norm = copy.deepcopy(cast(nn.BatchNorm2d, self.norms[u]))
        if self.weight is not None and self.bias is not None:
            norm.affine = True
            norm.weight = nn.Parameter(self.weight[: self.channels[u]].detach().clone())
            norm.bias = nn.Parameter(self.bias[: self.channels[u]].detach().clone())
        return norm


class SlimLinear(Slim):
    """A linear layer with as many inputs as the width has; the number of outputs is the same for all widths.

    Args:
        inputs: input features at every width, ascending.
        outputs: output features.
    """

    def __init__(self, inputs: Sequence[int], outputs: int) -> None:
        super().__init__()
        check_sizes(outputs=outputs)
        self.inputs = _channels("inputs", inputs)
        self.widths = len(inputs)
        linear = nn.Linear(inputs[-1], outputs)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor, u: int) -> Tensor:
        """(B, inputs[u]) to (B, outputs)."""
        return F.linear(x, self.weight[:, : self.inputs[u]], self.bias)

    def at(self, u: int) -> nn.Linear:
        """Width u as a plain linear layer."""
        linear = nn.Linear(self.inputs[u], self.weight.shape[0]).to(self.weight)
        linear.weight = nn.Parameter(self.weight[:, : self.inputs[u]].detach().clone())
        linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear


class SlimSequential(Slim):
    """A sequence of slimmable layers and of layers that take any number of channels (ReLU, pooling).

    Raises:
        StructureError: no slimmable layer, layers with different numbers of widths, or convolutions that do not fit.
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        found = {part.widths for part in parts if isinstance(part, Slim)}
        if len(found) != 1:
            raise StructureError(f"slimmable layers of one number of widths were expected; got {sorted(found)}")
        known = [part for part in parts if isinstance(part, Slim) and not isinstance(part, SlimBatchNorm2d)]
        for before, after in pairwise(known):
            both = isinstance(before, SlimConv2d) and isinstance(after, SlimConv2d)
            if both and before.outputs != after.inputs:
                raise StructureError(
                    f"a slimmable convolution gives {before.outputs} channels, and the next one takes {after.inputs}"
                )
        self.parts = nn.ModuleList(parts)
        self.widths = found.pop()

    def forward(self, x: Tensor, u: int) -> Tensor:
        """Every layer at width u, (B, ...) to (B, ...)."""
        for part in self.parts:
            x = part(x, u) if isinstance(part, Slim) else part(x)
        return x

    def at(self, u: int) -> nn.Sequential:
        """Width u as a plain nn.Sequential."""
        return nn.Sequential(*(part.at(u) if isinstance(part, Slim) else copy.deepcopy(part) for part in self.parts))


class SlimResidual(Slim):
    """The ReLU of the sum of a branch and a shortcut.

    Args:
        branch: slimmable.
        shortcut: slimmable to the same channels; None for the input itself.

    Raises:
        StructureError: a branch and a shortcut with different numbers of widths.
    """

    def __init__(self, branch: Slim, shortcut: Slim | None = None) -> None:
        super().__init__()
        if shortcut is not None and shortcut.widths != branch.widths:
            raise StructureError(f"a branch of {branch.widths} widths with a shortcut of {shortcut.widths}")
        self.branch = branch
        self.shortcut = shortcut
        self.widths = branch.widths

    def forward(self, x: Tensor, u: int) -> Tensor:
        """(B, inputs[u], H, W) to the shape of the branch's output."""
        return (self.branch(x, u) + (x if self.shortcut is None else self.shortcut(x, u))).relu()

    def at(self, u: int) -> "PlainResidual":
        """Width u as a plain residual block."""
        return PlainResidual(self.branch.at(u), nn.Identity() if self.shortcut is None else self.shortcut.at(u))


class PlainResidual(nn.Module):
    """A `SlimResidual` at one width."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the shape of the branch's output."""
        return (self.branch(x) + self.shortcut(x)).relu()


def scaled(channels: int, ratios: Sequence[float]) -> tuple[int, ...]:
    """Channels at every ratio of the full width, rounded down as in MobileNet.

    >>> scaled(64, (0.25, 0.5, 1.0))
    (16, 32, 64)

    Raises:
        ConfigError: ratios that are not ascending or not in (0, 1].
    """
    rising = all(a < b for a, b in pairwise(ratios))
    if not ratios or not rising or not 0 < ratios[0] <= ratios[-1] <= 1:
        raise ConfigError(f"ratios must be ascending, above 0 and at most 1, got {tuple(ratios)}")
    return tuple(max(1, int(channels * ratio)) for ratio in ratios)


def _channels(name: str, channels: Sequence[int]) -> tuple[int, ...]:
    check_sizes(**{name: tuple(channels)})
    if not channels or any(a > b for a, b in pairwise(channels)):
        raise ConfigError(f"{name} must be one number per width, ascending, got {tuple(channels)}")
    return tuple(channels)
