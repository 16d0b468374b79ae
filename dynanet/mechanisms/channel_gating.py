"""Channel gating: a convolution sums over some input channels, then decides whether the others are worth it."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.dynamic import Dynamic, Kept
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate, Rule
from dynanet.core.objective import Objective
from dynanet.core.rows import LEADING, Rows
from dynanet.core.trace import Trace
from dynanet.gates.rules import StraightThrough
from dynanet.ops.tiles import Tiles


class ChannelGating(Dynamic):
    """A convolution in two parts, of which the second runs where the first says so (CGNet: Hua et al. 2019,
    arXiv:1805.12549, section 3).

    The base path convolves some of the input channels, for everybody. Where the normed partial sum exceeds a learnt
    threshold, the other channels are added, and the whole sum gets a norm of its own; elsewhere the normed partial sum
    is the answer. The paper decides for every activation, which is `groups` as many as outputs on tiles of 1; what a
    CPU or GPU can skip is larger:

    - a unit is a group of output channels, with a base path of its own: every group reads other input channels, spread
      over all of them, so that what one group answers reaches all groups of the next layer (the paper's grouping and
      channel shuffle in one);
    - a row is a sample; with `tiles`, a tile of the image. The convolution must then be a stride-1 same convolution.

    Args:
        conv: what is split: stride-1 or strided, without grouping. Its weights are copied; fully open, and with norms
            that are new, the layer answers as a batch norm after this convolution would.
        base: input channels of the base path.
        groups: the output channels decide in so many groups.
        tiles: the tile, and the halo that the convolution reads.
        rule: from scores to keep; `StraightThrough(temperature=0.5)` if None, the paper's slope.
        threshold: where thresholds start, in standard deviations. Below 0, the layer starts mostly open.

    Attributes:
        base: the convolutions of the base paths, bias included, as one grouped convolution.
        rest: for every unit the convolution of the other channels.
        gate: scores the normed partial sum.

    Raises:
        StructureError: a base that leaves nothing to either part, groups that do not divide the outputs, or a
            convolution that cannot be split or run on tiles.
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
        inputs, outputs = conv.in_channels, conv.out_channels
        if conv.groups != 1 or not 1 <= base < inputs:
            raise StructureError(
                f"a base path of {base} channels and {conv}: give it at least one input channel and leave at least one "
                f"of {inputs}, in a convolution without grouping"
            )
        if not math.isfinite(threshold):
            raise ConfigError(f"a gated convolution got a threshold of {threshold}; give a finite number")
        if groups < 1 or outputs % groups:
            raise StructureError(f"{outputs} output channels in {groups} groups; give a number that divides them")
        self.rows: Rows = LEADING if tiles is None else tiles
        self.tile = None if tiles is None else Tiles(tiles.tile)
        self.channels, self.units, size = base, groups, outputs // groups
        read, left = _channels(inputs, base, groups)
        self.reads: Tensor
        self.register_buffer("reads", torch.tensor(read, device=conv.weight.device).flatten(), persistent=False)
        self.lefts: Tensor
        self.register_buffer("lefts", torch.tensor(left, device=conv.weight.device), persistent=False)
        mine = conv.weight.detach().split(size)  # the weights of every group's outputs
        self.base = _part(conv, [weight[:, ins] for weight, ins in zip(mine, read, strict=True)], conv.bias)
        self.rest = nn.ModuleList(_part(conv, [weight[:, ins]]) for weight, ins in zip(mine, left, strict=True))
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
        alone = self.units == 1  # reads the first channels: no copy is made of them
        partial = self.base(x_BCHW[:, : self.channels] if alone else x_BCHW.index_select(1, self.reads))
        normed = self.partial_norm(partial)
        keep = self.tap(self.gate(normed)).keep
        answers = []
        sums, norms = partial.chunk(self.units, 1), normed.chunk(self.units, 1)
        for u, (some, otherwise) in enumerate(zip(sums, norms, strict=True)):
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
    kept. What is compared here is a mean over a group's channels and a sample's or tile's positions, whose spread is
    far smaller than an activation's; so the mean is normed too. Channels have learnt weights in it.

    Args:
        channels: of the partial sum (B, C', H', W').
        groups: of channels.
        tiles: one score per tile instead of per sample.
        threshold: where thresholds start.
    """

    def __init__(self, channels: int, groups: int, tiles: Tiles | None, threshold: float) -> None:
        super().__init__()
        self.groups, self.tile = groups, None if tiles is None else tiles.tile
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


class ThresholdTarget(Objective):
    """Draws every threshold of a model's gated convolutions towards a target (CGNet, arXiv:1805.12549).

    A term like those of `train`: `term(answer, y, trace)`. The higher the target, the less is computed; the paper's
    target grows with the saving that is wanted. For a budget in MACs use `train.BudgetPenalty` instead.

    Args:
        target: the thresholds' goal, T in the paper.
    """

    def __init__(self, target: float) -> None:
        self.target = target

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The sum over layers of the channels' mean (target - threshold)^2.

        Raises:
            StructureError: the model has no such layer.
        """
        found = [layer for layer in trace.names if isinstance(layer, ChannelGating)]
        if not found:
            raise StructureError(
                f"no ChannelGating in this model, whose dynamic layers are {sorted(trace.names.values())}; this term "
                f"is for such layers"
            )
        misses = [(self.target - layer.thresholds).square().mean() for layer in found]
        return torch.stack(misses).sum()

    def __repr__(self) -> str:
        return f"ThresholdTarget({self.target:g})"


def _channels(inputs: int, base: int, groups: int) -> tuple[list[list[int]], list[list[int]]]:
    """For every group the input channels of its base path, and the others."""
    apart = inputs // base if groups > 1 else 1
    read = [[apart * i + u % apart for i in range(base)] for u in range(groups)]
    return read, [sorted(set(range(inputs)) - set(ins)) for ins in read]


def _part(conv: nn.Conv2d, weights: list[Tensor], bias: Tensor | None = None) -> nn.Conv2d:
    """A convolution like conv, with copies of these weights: one part of the channels for each."""
    part = copy.deepcopy(conv)  # stride, padding and the like stay as they are
    weight = torch.cat(weights).contiguous()
    part.groups, part.in_channels, part.out_channels = len(weights), len(weights) * weight.shape[1], weight.shape[0]
    part.weight = nn.Parameter(weight)
    part.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return part
