"""Position halting: each position of an image stops being updated on its own, and its neighbours still read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.gates.scorers import ContextScorer
from dynanet.ops.compact import Compact
from dynanet.ops.halting import halting_calls, halting_scores, ponder_cost
from dynanet.ops.tiles import Tiles, tile_mean


class PositionHalting(Dynamic):
    """Spatially adaptive computation time (SACT: Figurnov et al. 2017, arXiv:1612.02297, section 3.2).

    After step n a position has the halting score h_n. It stops at the first step N at which its scores sum to 1 - eps
    or more, the last step if none does. The answer is the mean of its states weighted with the scores, the last with
    the remainder R = 1 - (h_1 + ... + h_{N-1}). A position that stopped keeps its state, which neighbouring
    convolutions still read. `PositionPonderCost` is the loss term that makes positions stop.

    Unit k is cell k, rows are tiles. With `dilate` rows are positions, and a cell has one unit for every convolution
    that reads neighbours and one for what comes before the first.

    Args:
        cells: cell k maps (B, C, H, W) to the same shape, with stride-1 same convolutions.
        halting: maps (B, C, H, W) to halting logits (B, tiles down, tiles across, 1): one for all steps, or a sequence
            with one for every step but the last. The 3x3 convolution of a `ContextScorer` runs only where a position
            continues; any other module runs everywhere.
        tiles: the granularity, and the halo of a cell.
        eps: how far below 1 a sum may stop.
        first: a step before the cells that runs everywhere, and may change the shape: a stage's strided unit. Without
            it, the first cell runs everywhere.
        residual: add a cell's answer to its input.
        dilate: every convolution of a cell runs where the next one reads, as in the paper, computed as compact rows.
            Otherwise each tile brings a halo of its own.

    Raises:
        StructureError: no cells, a cell that tiles cannot run, a dynamic layer inside one, or a wrong number of halting
            modules.
        ConfigError: eps outside (0, 1).
    """

    def __init__(
        self,
        cells: Sequence[nn.Module],
        halting: nn.Module | Sequence[nn.Module],
        tiles: Tiles,
        eps: float = 0.01,
        *,
        first: nn.Module | None = None,
        residual: bool = False,
        dilate: bool = False,
    ) -> None:
        super().__init__()
        if not cells:
            raise StructureError("position halting needs at least one cell, got none")
        if not 0 < eps < 1:
            raise ConfigError(f"eps must be between 0 and 1 (0.01 in the paper), got eps = {eps}")
        if not dilate:
            for cell in cells:
                tiles.check(cell)
        self.compact = [Compact(cell) for cell in cells] if dilate else []
        self.cells = nn.ModuleList(cells)
        self.first = first
        self.tiles = tiles
        self.eps = eps
        self.residual = residual
        self.steps = len(cells) + (first is not None)
        heads = [halting] * (self.steps - 1) if isinstance(halting, nn.Module) else list(halting)
        if len(heads) != self.steps - 1:
            raise StructureError(
                f"position halting of {self.steps} steps needs a halting module after each but the last; got "
                f"{len(heads)}"
            )
        for head in heads:
            if isinstance(head, ContextScorer) and head.tile != tiles.tile:
                raise StructureError(
                    f"a halting module scores tiles of {head.tile} and the layer has tiles of {tiles.tile}; make them "
                    f"equal"
                )
        self.halting = nn.ModuleList(heads)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the shape of a cell's answer.

        Raises:
            StructureError: halting scores that are not one for every tile.
        """
        if self.first is not None:
            x_BCHW = self.first(x_BCHW)
        alive = x_BCHW.new_ones(self.tiles.grid(x_BCHW))
        total = torch.zeros_like(alive)
        mean = torch.zeros_like(x_BCHW)
        unit = -1  # the cell of step k: k - 1 after a first unit, else k
        if self.first is None:
            always = alive[..., None]
            alive = self._record(0, Decision(always, always), x_BCHW, pinned=always)
            unit = 0
        for k in range(self.steps):
            if unit >= 0:
                x_BCHW = self._step(unit, alive, x_BCHW)
            should_continue = torch.zeros_like(alive)
            h = torch.zeros_like(alive)
            if k + 1 < self.steps:
                h = self._score(k, unit, alive, x_BCHW).sigmoid()
                score = (total + h)[..., None]
                own = Decision((score < 1 - self.eps).to(score.dtype), score)
                should_continue = self._record(unit + 1, own, x_BCHW, present=alive[..., None])
                h = torch.minimum(h, 1 - total)  # otherwise weights under a forced keep could sum to more than 1
            weight = alive * torch.where(should_continue > 0, h, 1 - total)
            total = total + weight
            mean = mean + self.tiles.spread(weight, x_BCHW) * x_BCHW
            alive = should_continue
            unit += 1
        return mean

    def _record(
        self, unit: int, own: Decision, x: Tensor, *, pinned: Tensor | None = None, present: Tensor | None = None
    ) -> Tensor:
        """Log which rows run a cell, and return it; as `tap`, in the units of a dilated cell."""
        decision = self.apply_override(own, pinned, present)
        if not self.compact:
            self.log(decision, unit)
        elif self.trace is not None:
            keep = torch.stack(self.compact[unit].sets(self.tiles.spread(decision.keep[..., 0], x)), -1)
            score = self.tiles.spread(decision.score[..., 0], x)[:, 0, :, :, None]
            self.log(Decision(keep, score), self._units(unit).start)
        return decision.keep[..., 0]

    def _units(self, cell: int) -> range:
        """The units of a cell."""
        before = sum(len(c.parts) for c in self.compact[:cell])
        return range(before, before + len(self.compact[cell].parts))

    def _step(self, k: int, alive: Tensor, x: Tensor) -> Tensor:
        if self.compact:
            cell, units = self.compact[k], self._units(k)
            keep = self.tiles.spread(alive, x)
            return cell.add(self, units, keep, x) if self.residual else cell.run(self, units, keep, x, x)
        otherwise = torch.zeros_like(x) if self.residual else x
        y = self.run(k, self.cells[k], alive, x, otherwise, rows=self.tiles)
        return x + y if self.residual else y

    def _score(self, k: int, unit: int, alive: Tensor, x: Tensor) -> Tensor:
        """The halting logit after step k, (B, tiles down, tiles across)."""
        head = self.halting[k]
        if unit < 0 or not isinstance(head, ContextScorer):
            logits = head(x)
            self.tiles.check_mask(logits, x)
            return logits[..., 0]
        zeros = torch.zeros_like(x[:, :1])
        if self.compact:
            last = self._units(unit)[-1]
            local = Compact(head.local)
            score = local.run(self, [last] * len(local.parts), self.tiles.spread(alive, x), x, zeros)
        else:
            score = self.run(unit, head.local, alive, x, zeros, rows=Tiles(self.tiles.tile, 1))
        return (tile_mean(score, self.tiles.tile) + head.overall(x))[..., 0]

    @classmethod
    def ponder_cost(cls) -> Objective:
        """Of all layers that halt positions."""
        return PositionPonderCost()


@dataclass(frozen=True)
class PositionPonderCost(Objective):
    """N + R, the steps and the remainder, averaged over batch and rows and summed over the layers of a model.

    Its gradient is -1 for every halting score before the last; N itself has none (Figurnov et al. 2017,
    arXiv:1612.02297, section 3.1). Weighted with the paper's tau: `CrossEntropy() + 0.01 * PositionPonderCost()`.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the halting scores in the trace.

        Raises:
            StructureError: no layer that halts positions, or one that ran several times or for some rows only.
        """
        costs = []
        for name, layer in trace.all(PositionHalting).items():
            calls = halting_calls(trace, name)
            if layer.first is None:
                calls = calls[1:]  # the first cell runs everywhere: that is recorded, but not decided
            keeps = [call.keep[..., -1:] for call in calls]  # the last part of a dilated cell runs at the kept rows
            costs.append(ponder_cost(keeps, halting_scores(calls)))
        return torch.stack(costs).sum()


def steps_taken(trace: Trace, name: str | None = None) -> Tensor:
    """N, the map of steps that every row took: (B, tiles down, tiles across), or (B, H, W) of a dilating layer.

    Args:
        trace: of one pass.
        name: of the PositionHalting; None where the model has only one.

    Raises:
        StructureError: no such layer, several and none named, or one that ran several times or for some rows only.
    """
    layer, name = trace.one(PositionHalting, name)
    calls = halting_calls(trace, name)
    if not calls:
        raise StructureError(f"{name!r} did not run in this pass; run the model inside `with record(model) as trace`")
    ran = torch.stack([call.keep[..., -1] for call in calls]).sum(0)
    return ran if layer.first is None else 1 + ran
