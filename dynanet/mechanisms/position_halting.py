"""Position halting: positions of an image stop being updated one by one, and stay for their neighbours to read."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import StructureError
from dynanet.ops.tiles import Tiles


class PositionHalting(Dynamic):
    """Spatially adaptive computation time (SACT: Figurnov et al. 2017, arXiv:1612.02297). First form.

    Every position (or tile) adds up halting scores over the steps and halts once the sum passes 1 - eps; the answer is
    the mean of its states weighted with the scores, the last with the remainder. Halted positions keep their state,
    because the convolutions beside them go on reading it.

    Args:
        cells: step k maps (B, C, H, W) to the same shape, with stride-1 same convolutions.
        halting: maps (B, C, H, W) to halting logits (B, tiles down, tiles across, 1), say a `TileScorer`.
        tiles: the granularity, and the halo of a cell.
        eps: how far below 1 a sum may stop.

    Raises:
        StructureError: no cells, a cell that tiles cannot run, a dynamic layer inside one.
    """

    def __init__(self, cells: Sequence[nn.Module], halting: nn.Module, tiles: Tiles, eps: float = 0.01):
        super().__init__()
        if not cells:
            raise StructureError("position halting needs at least one cell")
        for cell in cells:
            tiles.check(cell)
        self.cells, self.halting, self.tiles, self.eps = nn.ModuleList(cells), halting, tiles, eps

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        alive = x_BCHW.new_ones(self.tiles.grid(x_BCHW))
        total, answer = torch.zeros_like(alive), torch.zeros_like(x_BCHW)
        always = alive[..., None]
        self.tap(Decision(always, always), pinned=always)  # the first step
        for k, cell in enumerate(self.cells):
            x_BCHW = self.run(k, cell, alive, x_BCHW, otherwise=x_BCHW, rows=self.tiles)
            chance = torch.minimum(self.halting(x_BCHW)[..., 0].sigmoid(), 1 - total)
            goes_on = torch.zeros_like(alive)
            if k + 1 < len(self.cells):
                score = (total + chance)[..., None]
                own = Decision((score <= 1 - self.eps).to(score.dtype), score)
                goes_on = self.tap(own, first=k + 1, present=alive[..., None]).keep[..., 0]
            weight = alive * torch.where(goes_on > 0, chance, 1 - total)
            total = total + weight
            answer = answer + self.tiles.spread(weight, x_BCHW) * x_BCHW
            alive = goes_on
        return answer
