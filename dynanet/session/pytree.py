"""Flatten pytrees for engines, which take and return flat tensors."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class Layout:
    """A pytree without its tensors; other leaves stay in place.

    Attributes:
        tensors: number of tensors.
    """

    def __init__(self, tree: Any) -> None:
        leaves, self._structure = tree_flatten(tree)
        self._others = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        self.tensors = len(leaves) - len(self._others)

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The pytree with these tensors."""
        leaves: list[Any] = list(tensors)
        for i, other in self._others.items():
            leaves.insert(i, other)
        return tree_unflatten(leaves, self._structure)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a pytree, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]
