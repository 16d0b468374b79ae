"""Layers that run at several widths, which share their weights: width u is the first channels of each."""

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
        widths: how many there are.
    """

    widths: int

    @abstractmethod
    def forward(self, x: Tensor, u: int) -> Tensor:
        """The answer at width u."""

    @abstractmethod
    def at(self, u: int) -> nn.Module:
        """Width u as a plain module with weights of its own: what is deployed."""


class SlimConv2d(Slim):
    """A convolution without bias whose width u is the first rows and columns of its weights (arXiv:1812.08928).

    Args:
        inputs: channels that come in at every width.
        outputs: channels that go out at every width. A layer that stays as it is repeats a number.
        kernel: side of the kernel, odd; zeros pad it.
        stride: of the convolution.
        depthwise: every channel by itself.

    Raises:
        ConfigError: widths that are no whole numbers from 1 up, that fall, or that are not as many in as out; a kernel
            that is not odd.
    """

    def __init__(
        self, inputs: Sequence[int], outputs: Sequence[int], kernel: int, stride: int = 1, *, depthwise: bool = False
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = _channels("inputs", inputs), _channels("outputs", outputs)
        if len(inputs) != len(outputs) or (depthwise and self.inputs != self.outputs):
            raise ConfigError(
                f"a slimmable convolution takes {self.inputs} and answers {self.outputs} channels; give one number in "
                f"and one out for every width{', the same ones where it is depthwise' if depthwise else ''}"
            )
        if kernel < 1 or kernel % 2 == 0:
            raise ConfigError(f"a slimmable convolution got a kernel of {kernel}; give an odd one")
        self.kernel, self.stride, self.depthwise, self.widths = kernel, stride, depthwise, len(self.outputs)
        self.weight = nn.Parameter(torch.empty(outputs[-1], 1 if depthwise else inputs[-1], kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out" if not depthwise else "fan_in", nonlinearity="relu")

    def forward(self, x: Tensor, u: int) -> Tensor:
        """(B, inputs[u], H, W) to (B, outputs[u], H', W')."""
        return F.conv2d(x, self._slice(u), None, self.stride, self.kernel // 2, 1, self._groups(u))

    def at(self, u: int) -> nn.Conv2d:
        """A plain convolution."""
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
    """A batch norm with statistics of its own for every width (switchable batch norm, arXiv:1812.08928, section 3.2).

    One norm for all widths would mix statistics that differ. With `shared` only they are apart and the widths share
    scale and shift, as US-Nets do (arXiv:1903.05134); `train.recalibrate_batchnorm` refreshes either.

    Args:
        channels: at every width.
        shared: one scale and shift for all widths.
    """

    def __init__(self, channels: Sequence[int], *, shared: bool = False) -> None:
        super().__init__()
        self.channels, self.widths, self.shared = _channels("channels", channels), len(channels), shared
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
        """A plain batch norm."""
        norm = copy.deepcopy(cast(nn.BatchNorm2d, self.norms[u]))
        if self.weight is not None and self.bias is not None:
            norm.affine = True
            norm.weight = nn.Parameter(self.weight[: self.channels[u]].detach().clone())
            norm.bias = nn.Parameter(self.bias[: self.channels[u]].detach().clone())
        return norm


class SlimLinear(Slim):
    """A linear map from as many features as the width has; the answer is as long at every width.

    Args:
        inputs: features that come in at every width.
        outputs: features that go out.
    """

    def __init__(self, inputs: Sequence[int], outputs: int) -> None:
        super().__init__()
        check_sizes(outputs=outputs)
        self.inputs, self.widths = _channels("inputs", inputs), len(inputs)
        linear = nn.Linear(inputs[-1], outputs)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor, u: int) -> Tensor:
        """(B, inputs[u]) to (B, outputs)."""
        return F.linear(x, self.weight[:, : self.inputs[u]], self.bias)

    def at(self, u: int) -> nn.Linear:
        """A plain linear map."""
        linear = nn.Linear(self.inputs[u], self.weight.shape[0]).to(self.weight)
        linear.weight = nn.Parameter(self.weight[:, : self.inputs[u]].detach().clone())
        linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear


class SlimSequential(Slim):
    """Layers one after another, slimmable ones and such as take any number of channels (ReLU, pooling).

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
                    f"a slimmable convolution answers {before.outputs} channels, and the next one takes {after.inputs}"
                )
        self.parts, self.widths = nn.ModuleList(parts), found.pop()

    def forward(self, x: Tensor, u: int) -> Tensor:
        """Every layer at width u."""
        for part in self.parts:
            x = part(x, u) if isinstance(part, Slim) else part(x)
        return x

    def at(self, u: int) -> nn.Sequential:
        """The layers as they are at width u."""
        return nn.Sequential(*(part.at(u) if isinstance(part, Slim) else copy.deepcopy(part) for part in self.parts))


class SlimResidual(Slim):
    """A branch, a shortcut beside it, and a ReLU over their sum.

    Args:
        branch: slimmable.
        shortcut: slimmable to the same channels; None for the input itself.

    Raises:
        StructureError: a branch and a shortcut with different numbers of widths.
    """

    def __init__(self, branch: Slim, shortcut: Slim | None = None) -> None:
        super().__init__()
        if shortcut is not None and shortcut.widths != branch.widths:
            raise StructureError(f"a branch of {branch.widths} widths beside a shortcut of {shortcut.widths}")
        self.branch, self.shortcut, self.widths = branch, shortcut, branch.widths

    def forward(self, x: Tensor, u: int) -> Tensor:
        """(B, inputs[u], H, W) to the branch's answer's shape."""
        return (self.branch(x, u) + (x if self.shortcut is None else self.shortcut(x, u))).relu()

    def at(self, u: int) -> "PlainResidual":
        """A plain residual block."""
        return PlainResidual(self.branch.at(u), nn.Identity() if self.shortcut is None else self.shortcut.at(u))


class PlainResidual(nn.Module):
    """What a `SlimResidual` is at one width."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the branch's answer's shape."""
        return (self.branch(x) + self.shortcut(x)).relu()


def scaled(channels: int, ratios: Sequence[float]) -> tuple[int, ...]:
    """Channels at every ratio of the full width, rounded down to whole ones as MobileNet does.

    >>> scaled(64, (0.25, 0.5, 1.0))
    (16, 32, 64)

    Raises:
        ConfigError: ratios that are not ascending or not in (0, 1].
    """
    rising = all(a < b for a, b in pairwise(ratios))
    if not ratios or not rising or not 0 < ratios[0] <= ratios[-1] <= 1:
        raise ConfigError(f"widths are {tuple(ratios)}; expected ascending ratios above 0 and at most 1")
    return tuple(max(1, int(channels * ratio)) for ratio in ratios)


def _channels(name: str, channels: Sequence[int]) -> tuple[int, ...]:
    whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= 1 for c in channels)
    if not channels or not whole or any(a > b for a, b in pairwise(channels)):
        raise ConfigError(f"{name} of the widths are {tuple(channels)}; expected ascending whole numbers of at least 1")
    return tuple(channels)
