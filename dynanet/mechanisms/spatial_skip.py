"""Spatial skip: a gate decides per tile (or position) whether a branch runs there. First form."""

from torch import Tensor, nn

from dynanet.core.dynamic import Dynamic
from dynanet.ops.tiles import Tiles


class SpatialSkip(Dynamic):
    """x + branch(x) where a tile keeps the branch, x elsewhere (DynConv, arXiv:1912.03203; LASNet, arXiv:2210.06223).

    Args:
        branch: stride-1 same convolutions and position-wise layers, output shaped as the input.
        gate: maps (B, C, H, W) to a Decision with keep (B, tiles down, tiles across, 1).
        tiles: the size of a tile, and the halo that the branch reads.

    Raises:
        StructureError: a branch that tiles cannot run, or a dynamic layer inside it.
    """

    def __init__(self, branch: nn.Module, gate: nn.Module, tiles: Tiles):
        super().__init__()
        tiles.check(branch)
        self.branch, self.gate, self.tiles = branch, gate, tiles

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        keep = self.tap(self.gate(x_BCHW)).keep[..., 0]
        return x_BCHW + self.run(0, self.branch, keep, x_BCHW, otherwise=0 * x_BCHW, rows=self.tiles)
