"""Spatial skip: a gate decides per tile (or position) whether a branch runs there."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import StructureError, check_shares
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.trace import Call, Trace
from dynanet.gates.scorers import ContextScorer, TileScorer
from dynanet.ops.compact import Compact
from dynanet.ops.native.pixels import channels_last
from dynanet.ops.tiles import Tiles


class SpatialSkip(Dynamic):
    """x + branch(x) where a tile keeps the branch, x elsewhere (DynConv, arXiv:1912.03203; LASNet, arXiv:2210.06223).

    The unit is the branch and rows are tiles. With `dilate` rows are positions, and the branch has one unit for every
    convolution that reads neighbours and one for what comes before the first.

    Args:
        branch: stride-1 same convolutions and position-wise layers, output shaped as the input.
        gate: maps (B, C, H, W) to a Decision with keep (B, tiles down, tiles across, 1), such as a `ContextScorer` with
            a `Gumbel` rule: DynConv's mask unit.
        tiles: the size of a tile, and the halo that the branch reads.
        dilate: every convolution runs where the next one reads, the mask dilated as in DynConv, computed as compact
            rows. Otherwise each tile brings a halo of its own.

    Raises:
        StructureError: a branch that tiles cannot run, a dynamic layer inside it, or scores of tiles of another size.
    """

    def __init__(self, branch: nn.Module, gate: nn.Module, tiles: Tiles, *, dilate: bool = False) -> None:
        super().__init__()
        if not dilate:
            tiles.check(branch)
        for scorer in gate.modules():
            if isinstance(scorer, ContextScorer | TileScorer) and scorer.tile != tiles.tile:
                raise StructureError(
                    f"the gate scores tiles of {scorer.tile} and the layer has tiles of {tiles.tile}; make them equal"
                )
        self.compact = Compact(branch) if dilate else None
        self.branch = branch
        self.gate = gate
        self.tiles = tiles

    @property
    def runs_whole(self) -> bool:
        """Whether gate and branch are one native call each, so that a session gains nothing from engines for parts."""
        scorer = self.gate.scorer if isinstance(self.gate, Gate) else None
        return isinstance(scorer, ContextScorer) and scorer.native and self.compact is not None and self.compact.native

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape.

        Raises:
            StructureError: the gate's mask is not of one keep for every tile.
        """
        # In the sparse form gate and branch read positions as rows.
        x = channels_last(x_BCHW) if self.compact is not None and self.gathers else x_BCHW
        own = self.gate(x)
        self.tiles.check_mask(own.keep, x_BCHW)
        if self.compact is None:
            keep = self.tap(own).keep[..., 0]
            return x_BCHW + self.run(0, self.branch, keep, x_BCHW, otherwise=0 * x_BCHW, rows=self.tiles)
        decision = self.apply_override(own)
        mask = self.tiles.spread(decision.keep[..., 0], x_BCHW)
        if self.trace is not None:
            score = self.tiles.spread(decision.score[..., 0], x_BCHW)[:, 0, :, :, None]
            self.log(Decision(torch.stack(self.compact.sets(mask), -1), score))
        owned = x is not x_BCHW and self.trace is None  # a score in the trace might be a view of x
        return self.compact.add(self, range(len(self.compact.reach)), mask, x, owned=owned)


@dataclass
class SpatialBudget(Objective):
    """DynConv's budget: the network's share of its MACs is pulled to a target, each layer's kept between two bounds.

    (F - target)^2 + the mean over layers of max(0, f - (1 - p (1 - target)))^2 + max(0, p target - f)^2, with f the
    share that a layer spent of its MACs with everything kept, averaged over the batch, F that of all layers together,
    and p falling from 1 to 0 (Verelst and Tuytelaars 2020, arXiv:1912.03203, section 3.4). At first every layer is held
    to the target, so that none is switched off before it has learnt anything; in the end only the sum is.

    Not frozen, because a schedule changes `tightness`.

    Args:
        target: the share of the layers' MACs, theta in the paper.
        cost: of this model; its example has the size of the training images.

    Attributes:
        full: MACs of the dense form, which stand for the cost model in the repr.
        tightness: p. `anneal_bounds` lowers it.

    Raises:
        ConfigError: a target outside [0, 1].
    """

    target: float
    cost: CostModel = field(repr=False)
    full: float = field(init=False)
    tightness: float = field(default=1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        check_shares(target=self.target)
        self.full = self.cost.full

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the decisions of the spatial layers in the trace.

        Raises:
            StructureError: no spatial layer decided, or one that is not in the cost model.
        """
        found = trace.all(SpatialSkip)
        shares = [self._spent(found[call.name], call) for call in trace.decisions(SpatialSkip)]
        spent, full = (torch.stack(column) for column in zip(*shares, strict=True))
        share = spent / full.clamp(min=1)
        above = (share - (1 - self.tightness * (1 - self.target))).clamp(min=0)
        below = (self.tightness * self.target - share).clamp(min=0)
        loss = (spent.sum() / full.sum() - self.target).square() + (above.square() + below.square()).mean()
        return loss.to(answer.dtype) if isinstance(answer, Tensor) else loss

    def _spent(self, layer: SpatialSkip, call: Call) -> tuple[Tensor, Tensor]:
        """The MACs that a layer spent and those with everything kept, averaged over the batch."""
        if call.name not in self.cost.unit:
            raise StructureError(f"layer {call.name!r} is not in this cost model; make one for this model")
        prices = self.cost.unit[call.name].to(call.keep.device)
        full = layer.price(torch.ones_like(call.keep), prices).mean().detach()
        return layer.price(call.keep, prices).mean(), full


def anneal_bounds(budget: SpatialBudget, *, share: float = 0.33) -> Callable[[float], None]:
    """A schedule that lowers the tightness from 1 to 0 as a squared cosine over the first `share` of training.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    check_shares(positive=True, share=share)

    def set_tightness(progress: float) -> None:
        budget.tightness = math.cos(min(max(progress / share, 0.0), 1.0) * math.pi / 2) ** 2

    return set_tightness
