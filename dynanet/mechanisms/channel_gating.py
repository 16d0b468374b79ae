"""Channel gating: a convolution sums over some input channels, then decides whether to add the others."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.dynamic import Dynamic, Kept
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate, Rule
from dynanet.core.objective import Objective
from dynanet.core.plain import check_plain
from dynanet.core.rows import LEADING, Rows
from dynanet.core.trace import Trace
from dynanet.gates.rules import StraightThrough
from dynanet.ops.tiles import Tiles


class ChannelGating(Dynamic):
    """A convolution in two parts, of which the second runs where the sum of the first exceeds a learnt threshold.

    CGNet (Hua et al. 2019, arXiv:1805.12549, section 3). The base path convolves some of the input channels, for all
    rows. Where the normed partial sum exceeds the threshold, the other channels are added, and the whole sum gets a
    norm of its own; elsewhere the normed partial sum is the answer. The paper decides for every activation, which is
    one group per output channel on tiles of 1; what a CPU or GPU can skip is larger:

    - a unit is a group of output channels, with a base path of its own: every group reads other input channels, spread
      over all of them, so that every group of the next layer reads every group of this one (the paper's grouping and
      channel shuffle in one);
    - a row is a sample; with `tiles`, a tile of the image. The convolution must then be a stride-1 same convolution.

    Args:
        conv: the convolution to split: stride-1 or strided, without grouping. Its weights are copied; fully open, and
            with new norms, the layer equals a batch norm after this convolution.
        base: input channels of the base path.
        groups: number of groups of output channels.
        tiles: the tile, and the halo that the convolution reads.
        rule: from scores to keep; `StraightThrough(temperature=0.5)` if None, the paper's slope.
        threshold: initial thresholds, in standard deviations. Below 0, the layer starts mostly open.

    Attributes:
        base: the convolutions of the base paths, bias included, as one grouped convolution.
        rest: for every unit the convolution of the other channels.
        gate: scores the normed partial sum.

    Raises:
        StructureError: a base without channels or with all of them, groups that do not divide the outputs, or a
            convolution that cannot be split or run on tiles.
        ConfigError: a threshold that is not finite.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        base: int,
        *,
        groups: int = 1,
        tiles: Tiles | None = None,
        rule: Rule | None = None,
        threshold: float = -0.5,
    ) -> None:
        super().__init__()
        check_plain(conv, nn.Conv2d)
        inputs, outputs = conv.in_channels, conv.out_channels
        if conv.groups != 1 or not 1 <= base < inputs:
            raise StructureError(
                f"base is {base} for {conv}; expected a convolution without grouping, and at least one of its {inputs} "
                f"input channels in the base path and one outside"
            )
        if not math.isfinite(threshold):
            raise ConfigError(f"threshold must be a finite number, got {threshold}")
        if groups < 1 or outputs % groups:
            raise StructureError(f"groups must divide the {outputs} output channels, got {groups}")
        self.rows: Rows = LEADING if tiles is None else tiles
        self.tile = None if tiles is None else Tiles(tiles.tile)
        self.channels = base
        self.units = groups
        size = outputs // groups
        read, left = _channels(inputs, base, groups)
        self.reads: Tensor
        self.register_buffer("reads", torch.tensor(read, device=conv.weight.device).flatten(), persistent=False)
        self.lefts: Tensor
        self.register_buffer("lefts", torch.tensor(left, device=conv.weight.device), persistent=False)
        weights = conv.weight.detach().split(size)  # of every group's outputs
        self.base = _part(conv, [weight[:, ins] for weight, ins in zip(weights, read, strict=True)], conv.bias)
        self.rest = nn.ModuleList(_part(conv, [weight[:, ins]]) for weight, ins in zip(weights, left, strict=True))
        self.partial_norm = nn.BatchNorm2d(outputs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for _ in range(groups))
        scorer = PartialSumScorer(outputs, groups, tiles, threshold)
        self.gate = Gate(scorer, rule if rule is not None else StraightThrough(temperature=0.5), units=groups)
        if tiles is not None:
            tiles.check(self.rest[0])

    @property
    def thresholds(self) -> Tensor:
        """One per group of output channels, (groups,)."""
        assert isinstance(self.gate.scorer, PartialSumScorer)
        return self.gate.scorer.thresholds

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W'), before the activation."""
        alone = self.units == 1  # a single group reads the first channels: a slice, without a copy
        partial = self.base(x_BCHW[:, : self.channels] if alone else x_BCHW.index_select(1, self.reads))
        normed = self.partial_norm(partial)
        keep = self.tap(self.gate(normed)).keep
        answers = []
        groups = zip(partial.chunk(self.units, 1), normed.chunk(self.units, 1), strict=True)
        for u, (some, otherwise) in enumerate(groups):
            with self.only(u, keep[..., u], self.rows) as kept:
                if kept.empty:
                    answers.append(otherwise)
                    continue
                others = x_BCHW[:, self.channels :] if alone else x_BCHW.index_select(1, self.lefts[u])
                whole = self.norms[u](self._taken(kept, some) + kept.call(self.rest[u], others))
            answers.append(kept.put(whole, otherwise))
        return answers[0] if alone else torch.cat(answers, 1)

    def _taken(self, kept: Kept, partial: Tensor) -> Tensor:
        """The partial sum of the rows that are kept, without a halo."""
        if self.tile is None or kept.index is None:
            return kept.take(partial)
        return self.tile.take(partial, kept.lead, kept.index)[0]


class PartialSumScorer(nn.Module):
    """How far a group's partial sum lies above its threshold, in standard deviations.

    The paper norms every activation and compares it with its channel's threshold, so that a threshold says how much is
    kept. Compared here is a mean over a group's channels, with learnt weights, and over the positions of a sample or
    tile. Its spread is far smaller than an activation's, so the mean is normed too.

    Args:
        channels: of the partial sum (B, C', H', W').
        groups: of channels.
        tiles: one score per tile instead of per sample.
        threshold: initial thresholds.
    """

    def __init__(self, channels: int, groups: int, tiles: Tiles | None, threshold: float) -> None:
        super().__init__()
        self.groups = groups
        self.tile = None if tiles is None else tiles.tile
        self.thresholds = nn.Parameter(torch.full((groups,), float(threshold)))
        self.weights = nn.Parameter(torch.full((channels,), (groups / channels) ** 0.5))
        self.norm = nn.BatchNorm1d(groups, affine=False)

    def forward(self, normed_BCHW: Tensor) -> Tensor:
        """Scores (B, groups), or (B, tiles down, tiles across, groups)."""
        passing = nn.functional.softplus(normed_BCHW)  # about what the ReLU that follows lets through
        summed = (passing * self.weights[:, None, None]).unflatten(1, (self.groups, -1)).sum(2)
        if self.tile is None:
            mean = summed.mean((2, 3))
        else:
            pooled = nn.functional.avg_pool2d(summed, self.tile, ceil_mode=True, count_include_pad=False)
            mean = pooled.permute(0, 2, 3, 1)
        return self.norm(mean.flatten(0, -2)).view_as(mean) - self.thresholds


@dataclass(frozen=True)
class ThresholdTarget(Objective):
    """Pulls every threshold of a model's gated convolutions towards a target (CGNet, arXiv:1805.12549).

    The higher the target, the less is computed. For a budget in MACs use `train.BudgetPenalty` instead.

    Args:
        target: the thresholds' goal, T in the paper.
    """

    target: float

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The sum over layers of the channels' mean (target - threshold)^2.

        Raises:
            StructureError: the model has no such layer.
        """
        found = trace.all(ChannelGating).values()
        return torch.stack([(self.target - layer.thresholds).square().mean() for layer in found]).sum()


def _channels(inputs: int, base: int, groups: int) -> tuple[list[list[int]], list[list[int]]]:
    """For every group the input channels of its base path, and the others."""
    stride = inputs // base if groups > 1 else 1
    read = [[stride * i + u % stride for i in range(base)] for u in range(groups)]
    return read, [sorted(set(range(inputs)) - set(ins)) for ins in read]


def _part(conv: nn.Conv2d, weights: list[Tensor], bias: Tensor | None = None) -> nn.Conv2d:
    """A convolution with the settings of conv and copies of these weights, one group of channels for each."""
    part = copy.deepcopy(conv)
    weight = torch.cat(weights).contiguous()
    part.groups = len(weights)
    part.in_channels = len(weights) * weight.shape[1]
    part.out_channels = weight.shape[0]
    part.weight = nn.Parameter(weight)
    part.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return part
