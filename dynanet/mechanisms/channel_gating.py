"""Channel gating: a convolution sums over some input channels, then decides whether the others are worth it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import StructureError
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.gates.rules import StraightThrough
from dynanet.ops.tiles import Tiles


class ChannelGating(Dynamic):
    """A convolution in two parts, of which the second runs where the first says so (CGNet: Hua et al. 2019,
    arXiv:1805.12549, section 3).

    The base path convolves the first `base` input channels, for everybody. Where the normed partial sum exceeds learnt
    thresholds, the other channels are added, and the whole sum gets a norm of its own; elsewhere the normed partial sum
    is the answer. The paper decides for every activation; what a CPU or GPU can skip is larger:

    - without `tiles`: one unit per group of output channels, and samples as rows;
    - with `tiles`: one unit, and tiles of the image as rows. The convolution must be a stride-1 same convolution.

    Args:
        conv: what is split: stride-1 or strided, without grouping. Its weights are copied; fully open, and with norms
            that are new, the layer answers as a batch norm after this convolution would.
        base: input channels of the base path.
        groups: the output channels decide in so many groups.
        tiles: the tile, and the halo that the convolution reads.
        rule: from scores to keep; `StraightThrough()` if None.
        threshold: where every channel's threshold starts. Below 0, the layer starts mostly open.

    Attributes:
        base: the convolution of the first channels, its bias included.
        rest: for every unit the convolution of the other channels.
        gate: scores the normed partial sum.

    Raises:
        StructureError: a base that leaves nothing to either part, groups that do not divide the outputs, groups and
            tiles at once, or a convolution that cannot be split or run on tiles.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        base: int,
        *,
        groups: int = 1,
        tiles: Tiles | None = None,
        rule: nn.Module | None = None,
        threshold: float = -0.5,
    ):
        super().__init__()
        outputs = conv.out_channels
        if conv.groups != 1 or not 1 <= base < conv.in_channels:
            raise StructureError(
                f"a base path of {base} channels and {conv}: give it at least one input channel and leave at least one "
                f"of {conv.in_channels}, in a convolution without grouping"
            )
        if groups < 1 or outputs % groups or (tiles is not None and groups > 1):
            raise StructureError(
                f"{outputs} output channels in {groups} groups{' on tiles' if tiles is not None else ''}; give a "
                f"number that divides them, and 1 where tiles decide"
            )
        self.channels, self.tiles, self.units = base, tiles, groups
        self.base = _part(conv, slice(0, base), slice(0, outputs), bias=conv.bias is not None)
        size = outputs // groups
        self.rest = nn.ModuleList(
            _part(conv, slice(base, None), slice(u * size, (u + 1) * size), bias=False) for u in range(groups)
        )
        self.partial_norm = nn.BatchNorm2d(outputs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for _ in range(groups))
        scorer = PartialSumScorer(outputs, groups, tiles, threshold)
        self.gate = Gate(scorer, rule if rule is not None else StraightThrough(), units=groups)
        if tiles is not None:
            tiles.check(self.rest[0])

    @property
    def thresholds(self) -> Tensor:
        """One per output channel, (C',)."""
        assert isinstance(self.gate.scorer, PartialSumScorer)
        return self.gate.scorer.thresholds

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W'), before the activation."""
        partial = self.base(x_BCHW[:, : self.channels])
        normed = self.partial_norm(partial)
        keep = self.tap(self.gate(normed)).keep
        others = x_BCHW[:, self.channels :]
        if self.tiles is not None:
            k = self.tiles.spread(keep[..., 0], normed)
            added = self.run(
                0, self.rest[0], keep[..., 0], others, otherwise=torch.zeros_like(partial), rows=self.tiles
            )
            return k * self.norms[0](partial + added) + (1 - k) * normed
        answers = [
            self.run(u, self._whole(u), keep[:, u], (others, some), otherwise=otherwise)
            for u, (some, otherwise) in enumerate(
                zip(partial.chunk(self.units, 1), normed.chunk(self.units, 1), strict=True)
            )
        ]
        return answers[0] if self.units == 1 else torch.cat(answers, 1)

    def _whole(self, u: int) -> Any:
        def whole(parts: tuple[Tensor, Tensor]) -> Tensor:
            others, partial = parts
            return self.norms[u](partial + self.rest[u](others))

        return whole


class PartialSumScorer(nn.Module):
    """How far a normed partial sum lies above its channels' thresholds, in the mean of a group or a tile.

    A ReLU follows: what the base path already puts far below 0 will most likely stay there. In the mean of many
    activations that says little, so channels have learnt weights in it, 1 at the start.

    Args:
        channels: of the partial sum (B, C', H', W').
        groups: of channels.
        tiles: one score per tile instead of per sample.
        threshold: where every channel's threshold starts.
    """

    def __init__(self, channels: int, groups: int, tiles: Tiles | None, threshold: float):
        super().__init__()
        self.groups, self.tile = groups, None if tiles is None else tiles.tile
        self.thresholds = nn.Parameter(torch.full((channels,), float(threshold)))
        self.weights = nn.Parameter(torch.ones(channels))

    def forward(self, normed_BCHW: Tensor) -> Tensor:
        """Scores (B, groups), or (B, tiles down, tiles across, 1)."""
        above = (normed_BCHW - self.thresholds[:, None, None]) * self.weights[:, None, None]
        if self.tile is None:
            return above.unflatten(1, (self.groups, -1)).mean((2, 3, 4))
        mean = above.mean(1, keepdim=True)
        pooled = nn.functional.avg_pool2d(mean, self.tile, ceil_mode=True, count_include_pad=False)
        return pooled[:, 0, :, :, None]


class ThresholdTarget(Objective):
    """Draws every threshold of a model's gated convolutions towards a target (CGNet, arXiv:1805.12549).

    A term like those of `train`: `term(answer, y, trace)`. The higher the target, the less is computed; the paper's
    target grows with the saving that is wanted. For a budget in MACs use `train.Within` instead.

    Args:
        target: the thresholds' goal, T in the paper.
    """

    def __init__(self, target: float):
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


def _part(conv: nn.Conv2d, ins: slice, outs: slice, *, bias: bool) -> nn.Conv2d:
    """Some of a convolution's inputs and outputs, with copies of its weights."""
    weight = conv.weight.detach()[outs, ins]
    part = copy.deepcopy(conv)  # stride, padding and the like stay as they are
    part.in_channels, part.out_channels = weight.shape[1], weight.shape[0]
    part.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    part.bias = nn.Parameter(conv.bias.detach()[outs].clone()) if bias and conv.bias is not None else None
    return part
