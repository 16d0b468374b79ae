"""Layer skip: a gate decides per row whether a residual block runs."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import StructureError
from dynanet.core.gate import check_units
from dynanet.gates.recurrent import RecurrentGate


class LayerSkip(Dynamic):
    """Runs a block only for the rows that keep it (SkipNet, arXiv:1711.09485).

    The answer is keep * block(x) + (1 - keep) * otherwise(x). With a residual block whose input is not negative (after
    a ReLU) and the identity as `otherwise`, that is x + keep * branch(x).

    Args:
        block: the unit, its shortcut included; returns a tensor (or pytree) of the shape that `otherwise` returns.
        gate: maps x to a Decision with one unit: keep (rows, 1), or (B, T, 1) where tokens decide.
        otherwise: replaces a skipped block, and is always computed; the identity if None. Blocks that change the shape
            put their shortcut here.

    Raises:
        StructureError: a gate for more than one unit.
    """

    skippable = True

    def __init__(self, block: nn.Module, gate: nn.Module, otherwise: nn.Module | None = None) -> None:
        super().__init__()
        check_units(gate, 1, "layers")
        self.block, self.gate = block, gate
        self.otherwise = otherwise if otherwise is not None else nn.Identity()

    def forward(self, x: Any) -> Tensor:
        """The answer of the block where it ran, that of `otherwise` elsewhere."""
        keep = self.tap(self.gate(x)).keep
        return self.run(0, self.block, keep[..., 0], x, otherwise=self.otherwise(x))


class BranchSkip(Dynamic):
    """Skips the residual branch only: activation(shortcut(x) + keep * branch(x)) (ConvNet-AIG, arXiv:1711.11503).

    The shortcut always runs, once; so use this, not `LayerSkip`, for blocks whose shortcut is a convolution.

    Args:
        branch: the unit.
        gate: maps x to a Decision with one unit, keep (rows, 1).
        shortcut: None for the identity.
        activation: applied to the sum, not in place (where no row runs the branch, the sum is x itself); None for none.

    Raises:
        StructureError: a gate for more than one unit.
    """

    skippable = True

    def __init__(
        self, branch: nn.Module, gate: nn.Module, shortcut: nn.Module | None = None, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        check_units(gate, 1, "layers")
        self.branch, self.gate = branch, gate
        self.shortcut = shortcut if shortcut is not None else nn.Identity()
        self.activation = activation if activation is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, ...) to the shape that the shortcut returns."""
        keep = self.tap(self.gate(x)).keep
        shortcut = self.shortcut(x)
        return self.activation(self.run(0, self._added, keep[..., 0], (x, shortcut), otherwise=shortcut))

    def _added(self, both: tuple[Tensor, Tensor]) -> Tensor:
        x, shortcut = both
        return shortcut + self.branch(x)


class RecurrentSkip(Dynamic):
    """A chain of blocks that one recurrent gate runs or skips (SkipNet, arXiv:1711.09485, section 3.2).

    Unit k is block k; the trace holds one decision per block, in order.

    Args:
        blocks: the units, shortcuts included.
        gate: its projections fit the inputs of the blocks.
        otherwise: one module per block that replaces it where it is skipped, always computed; identities if None.

    Raises:
        StructureError: the numbers of blocks, of `otherwise` and of blocks that the gate decides on differ.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], gate: RecurrentGate, otherwise: Sequence[nn.Module] | None = None
    ) -> None:
        super().__init__()
        otherwise = otherwise if otherwise is not None else [nn.Identity() for _ in blocks]
        if not len(blocks) == gate.blocks == len(otherwise):
            raise StructureError(
                f"a recurrent gate for {gate.blocks} blocks got {len(blocks)} blocks and {len(otherwise)} shortcuts; "
                f"make the three numbers equal"
            )
        self.blocks = nn.ModuleList(blocks)
        self.gate = gate
        self.otherwise = nn.ModuleList(otherwise)

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, ...) to the answer of the last block."""
        memory = self.gate.start(x)
        for k, (block, otherwise) in enumerate(zip(self.blocks, self.otherwise, strict=True)):
            decision, memory = self.gate(k, x, memory)
            keep = self.tap(decision, first=k).keep
            x = self.run(k, block, keep[..., 0], x, otherwise=otherwise(x))
        return x
