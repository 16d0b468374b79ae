"""A Trace remembers every decision of a forward pass, each placed in the whole batch."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dynanet.core.decision import Decision
from dynanet.core.errors import StructureError

if TYPE_CHECKING:
    from dynanet.core.dynamic import Dynamic

L = TypeVar("L")


class Frame(NamedTuple):
    """Where the rows that a running unit sees lie among the rows of its layer.

    Attributes:
        layer: the layer whose unit runs.
        units: the units that run together; nearly always one.
        lead: the shape of the layer's keep without its unit axis.
        taken: sparse form: flat positions of the rows that were taken. None in the dense form.
        keep: dense form: the flat mask over all rows. None in the sparse form. Without both, the unit
            sees all rows in order.
        flat: the unit sees its rows along one axis in the dense form too (`Rows.flat`).
    """

    layer: "Dynamic"
    units: range
    lead: tuple[int, ...]
    taken: Tensor | None
    keep: Tensor | None
    flat: bool

    def home(self, keep: Tensor) -> Tensor:
        """A child's keep, from the rows its unit saw to all rows of the layer; 0 where the unit did not run."""
        if self.taken is not None:
            everywhere = keep.new_zeros(math.prod(self.lead), *keep.shape[1:]).index_copy(0, self.taken, keep)
            return everywhere.reshape(*self.lead, *keep.shape[1:])
        if self.keep is None:
            return keep.reshape(*self.lead, *keep.shape[1:])
        inner = keep.shape[1:] if self.flat else keep.shape[len(self.lead) :]
        mask = self.keep.to(keep.dtype).reshape(*self.lead, *[1] * len(inner))
        return keep.reshape(*self.lead, *inner) * mask


class Call(NamedTuple):
    """One decision of one layer.

    Attributes:
        name: the layer's name in the model.
        first: the unit that keep's first column speaks of.
        decision: as the layer made it, for the rows it saw.
        keep: (B, ..., units) in the whole batch: 0 for rows that never arrived.
        within: the units that were running around it, outermost first, as (layer's name, unit).
    """

    name: str
    first: int
    decision: Decision
    keep: Tensor
    within: tuple[tuple[str, int], ...]


class Trace:
    """The decisions of one forward pass.

    A layer that is called n times (a shared cell, a time step) is heard n times; `trace[name]` lists its keeps in
    order. `trace.answers[name]` holds the answers of a Halt's steps, for the rows that reached them. In training the
    keeps carry gradients, and those of a layer inside another reach the outer gate too.
    """

    def __init__(self, names: "dict[Dynamic, str]"):
        self.names = names
        self.frames: list[Frame] = []
        self.calls: list[Call] = []
        self.answers: dict[str, list[Any]] = {}

    def hear(self, layer: "Dynamic", decision: Decision, first: int) -> None:
        """Remember a decision, placed in the whole batch through the open frames."""
        keep = decision.keep
        for frame in reversed(self.frames):
            keep = frame.home(keep)
        within = tuple((self.names[f.layer], f.units.start) for f in self.frames)
        self.calls.append(Call(self.names[layer], first, decision, keep, within))

    def hear_answer(self, layer: "Dynamic", answer: Any) -> None:
        """Remember the answer of a Halt's step."""
        self.answers.setdefault(self.names[layer], []).append(answer)

    def __getitem__(self, name: str) -> list[Tensor]:
        if name not in self.names.values():
            raise KeyError(f"{name!r} is no dynamic layer of this model; there are {sorted(self.names.values())}")
        return [call.keep for call in self.calls if call.name == name]

    def one(self, kind: type[L], name: str | None = None) -> tuple[L, str]:
        """The layer of a kind that is meant, and its name, whether or not it ran.

        Args:
            kind: a class of layers.
            name: of the layer; None where the model has only one of this kind.

        Raises:
            StructureError: there is none, there are several and none is named, or none has this name.
        """
        found = {known: layer for layer, known in self.names.items() if isinstance(layer, kind)}
        meant = next(iter(found)) if name is None and len(found) == 1 else name
        if meant is None or meant not in found:
            raise StructureError(
                f"one {kind.__name__} is meant and {'none is' if meant is None else repr(meant) + ' was'} named; this "
                f"model has {sorted(found)}"
            )
        return found[meant], meant

    def runs(self, name: str, unit: int = 0) -> Tensor:
        """How often a unit of a layer ran for every row, (B, ...): for layers that are called again and again.

        Raises:
            StructureError: the unit was not decided about in this pass.
        """
        columns = [
            call.keep[..., unit - call.first]
            for call in self.calls
            if call.name == name and call.first <= unit < call.first + call.keep.shape[-1]
        ]
        if not columns:
            raise StructureError(
                f"{name!r} did not run in this trace; run the model inside `with record(model) as trace`"
            )
        return torch.stack(columns).sum(0)

    def keys(self) -> list[str]:
        """The names of the layers that decided, in the order of their first call."""
        return list(dict.fromkeys(call.name for call in self.calls))

    def __repr__(self) -> str:
        kept = {name: round(sum(k.mean().item() for k in self[name]) / len(self[name]), 3) for name in self.keys()}
        return f"Trace({len(self.calls)} decisions; mean keep {kept})"
