"""Layer skip: a gate decides per row whether a residual block runs."""

from typing import Any

from torch import Tensor, nn

from dynanet.core.dynamic import Dynamic


class LayerSkip(Dynamic):
    """Runs a block only for the rows that keep it (SkipNet, arXiv:1711.09485; ConvNet-AIG, arXiv:1711.11503).

    keep * block(x) + (1 - keep) * otherwise(x). With a residual block whose input is not negative (after a ReLU) and
    the identity as `otherwise`, that is the papers' x + keep * branch(x).

    Args:
        block: the unit, its shortcut included; answers a tensor (or pytree) shaped as `otherwise` answers.
        gate: maps x to a Decision with one unit: keep (rows, 1), or (B, T, 1) where tokens decide.
        otherwise: what takes the block's place, always computed; the identity if None. Blocks that change the shape
            put their shortcut here.
    """

    def __init__(self, block: nn.Module, gate: nn.Module, otherwise: nn.Module | None = None):
        super().__init__()
        self.block, self.gate = block, gate
        self.otherwise = otherwise if otherwise is not None else nn.Identity()

    def forward(self, x: Any) -> Tensor:
        """The block's answer where it ran, `otherwise`'s elsewhere."""
        keep = self.tap(self.gate(x)).keep
        return self.run(0, self.block, keep[..., 0], x, otherwise=self.otherwise(x))
