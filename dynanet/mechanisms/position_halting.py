"""Position halting: positions of an image stop being updated one by one, and stay for their neighbours to read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.objective import Objective
from dynanet.core.trace import Call, Trace
from dynanet.gates.scorers import ContextScorer, tile_mean
from dynanet.ops.compact import Compact
from dynanet.ops.tiles import Tiles


class PositionHalting(Dynamic):
    """Spatially adaptive computation time (SACT: Figurnov et al. 2017, arXiv:1612.02297, section 3.2).

    After step n a position has the halting score h_n. It stops at the first step N at which its scores sum to 1 - eps
    or more, the last step if none does. The answer is the mean of its states weighted with the scores, the last with
    the remainder R = 1 - (h_1 + ... + h_{N-1}). A position that stopped keeps its state, because the convolutions
    beside it go on reading it. `PositionPonderCost` is the term of the loss that makes positions stop.

    Unit k is cell k, rows are tiles; with `dilate` rows are positions and a cell has one unit for every convolution
    that reads neighbours, and one for what comes before the first.

    Args:
        cells: cell k maps (B, C, H, W) to the same shape, with stride-1 same convolutions.
        halting: maps (B, C, H, W) to halting logits (B, tiles down, tiles across, 1): one for all steps, or a sequence
            with one for every step but the last. The 3x3 convolution of a `ContextScorer` runs only where a position
            goes on; any other module runs everywhere.
        tiles: the granularity, and the halo of a cell.
        eps: how far below 1 a sum may stop.
        first: a step before the cells that runs everywhere, and may change the shape: a stage's strided unit. Without
            it, the first cell runs everywhere.
        residual: a cell's answer is added to its input.
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
            raise StructureError("position halting needs at least one cell")
        if not 0 < eps < 1:
            raise ConfigError(f"position halting got eps = {eps}; give a number between 0 and 1, 0.01 as in the paper")
        if not dilate:
            for cell in cells:
                tiles.check(cell)
        self.compact = [Compact(cell) for cell in cells] if dilate else []
        self.cells, self.first, self.tiles, self.eps, self.residual = nn.ModuleList(cells), first, tiles, eps, residual
        self.steps = len(cells) + (first is not None)
        heads = [halting] * (self.steps - 1) if isinstance(halting, nn.Module) else list(halting)
        if len(heads) != self.steps - 1:
            raise StructureError(
                f"position halting of {self.steps} steps needs a halting module after each but the last; got "
                f"{len(heads)}"
            )
        for head in heads:
            if isinstance(head, ContextScorer) and head.tile != tiles.tile:
                raise StructureError(f"scores of tiles of {head.tile} came for tiles of {tiles.tile}; make them equal")
        self.halting = nn.ModuleList(heads)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the shape of a cell's answer.

        Raises:
            StructureError: halting scores that are not one for every tile.
        """
        if self.first is not None:
            x_BCHW = self.first(x_BCHW)
        alive = x_BCHW.new_ones(self.tiles.grid(x_BCHW))
        total, mean, unit = torch.zeros_like(alive), torch.zeros_like(x_BCHW), -1
        if self.first is None:
            always = alive[..., None]
            alive, unit = self._goes_on(0, Decision(always, always), x_BCHW, pinned=always), 0
        for k in range(self.steps):
            if unit >= 0:
                x_BCHW = self._step(unit, alive, x_BCHW)
            should_continue, h = torch.zeros_like(alive), torch.zeros_like(alive)
            if k + 1 < self.steps:
                h = self._score(k, unit, alive, x_BCHW).sigmoid()
                score = (total + h)[..., None]
                own = Decision((score < 1 - self.eps).to(score.dtype), score)
                should_continue = self._goes_on(unit + 1, own, x_BCHW, present=alive[..., None])
                h = torch.minimum(h, 1 - total)  # else a forced keep could spend more than 1
            weight = alive * torch.where(should_continue > 0, h, 1 - total)
            total, mean = total + weight, mean + self.tiles.spread(weight, x_BCHW) * x_BCHW
            alive, unit = should_continue, unit + 1
        return mean

    def _goes_on(
        self, unit: int, own: Decision, x: Tensor, *, pinned: Tensor | None = None, present: Tensor | None = None
    ) -> Tensor:
        """Which rows run a cell, obeyed and told."""
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
            cell, units, keep = self.compact[k], self._units(k), self.tiles.spread(alive, x)
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


class PositionPonderCost(Objective):
    """N + R, the steps and the remainder, averaged over batch and rows and summed over the layers of a model.

    Its gradient is -1 for every halting score before the last; N itself has none (Figurnov et al. 2017,
    arXiv:1612.02297, section 3.1). Weighted with the paper's tau: `CrossEntropy() + 0.01 * PositionPonderCost()`.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the halting scores in the trace.

        Raises:
            StructureError: no layer that halts positions, or one that was called more than once or by some rows only.
        """
        found = [(layer, name) for layer, name in trace.names.items() if isinstance(layer, PositionHalting)]
        if not found:
            raise StructureError(
                f"a ponder cost of positions needs PositionHalting, and the layers are {sorted(trace.names.values())}"
            )
        return torch.stack([_ponder(layer, halting_calls(trace, name)) for layer, name in found]).sum()

    def __repr__(self) -> str:
        return "PositionPonderCost()"


def steps_taken(trace: Trace, name: str = "") -> Tensor:
    """N, the map of steps that every row took: (B, tiles down, tiles across), or (B, H, W) of a dilating layer.

    Args:
        trace: of one pass.
        name: the layer's name.

    Raises:
        StructureError: no such layer, or it did not decide in one pass about the same rows.
    """
    found = {n: layer for layer, n in trace.names.items() if isinstance(layer, PositionHalting)}
    calls = halting_calls(trace, name)
    if name not in found or not calls:
        raise StructureError(f"no steps of {name!r} in this trace; the layers that halt positions are {sorted(found)}")
    ran = torch.stack([call.keep[..., -1] for call in calls]).sum(0)
    return ran if found[name].first is None else 1 + ran


def halting_calls(trace: Trace, name: str) -> list[Call]:
    """The decisions of one pass through a layer, each about every row.

    Raises:
        StructureError: several passes, or rows that never arrived.
    """
    calls = [call for call in trace.calls if call.name == name]
    rows = {call.decision.score.shape[:-1] for call in calls} | {call.keep.shape[:-1] for call in calls}
    if len(rows) > 1 or len({call.first for call in calls}) < len(calls):
        raise StructureError(
            f"the ponder cost and the steps of {name!r} need one pass that every row reached; this trace has "
            f"{len(calls)} decisions about rows {sorted(map(tuple, rows))}: use train mode or the dense form, and call "
            f"it once per pass"
        )
    return calls


def _ponder(layer: PositionHalting, calls: list[Call]) -> Tensor:
    """N + R: the first step and all the remainder, then for every step gone past 1 and minus its score."""
    calls = calls if layer.first is not None else calls[1:]  # without it the first decision is no decision
    cost = torch.full((), 2.0)
    for k, call in enumerate(calls):
        score, keep = call.decision.score, call.keep[..., -1:].detach()
        own = score if k == 0 else score - calls[k - 1].decision.score
        cost = cost + (keep * (1 - own)).mean()
    return cost
