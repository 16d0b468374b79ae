"""A Trace remembers every decision of a forward pass, each placed in the whole batch."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.errors import StructureError

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

    layer: nn.Module
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

    def with_inner(self, inner: "Frame") -> "Frame | None":
        """One frame that takes home what this one does after `inner`, so that a stack of frames costs what one does.

        None where they are of two kinds, or dense ones of rows with several axes: those stay two.
        """
        if self.taken is not None and inner.taken is not None and inner.lead[:1] == self.taken.shape:
            taken, each = self.taken, math.prod(inner.lead[1:])
            if len(inner.lead) > 1:  # every row that this one took has rows of its own
                taken = (taken[:, None] * each + torch.arange(each, device=taken.device)).flatten()
            return inner._replace(lead=(*self.lead, *inner.lead[1:]), taken=taken[inner.taken])
        if self.keep is None or inner.keep is None or self.lead != inner.lead or len(self.lead) != 1:
            return None
        return inner._replace(keep=self.keep * inner.keep) if self.keep.dtype == inner.keep.dtype else None


class Call(NamedTuple):
    """One decision of one layer.

    Attributes:
        name: the layer's name in the model.
        first: the unit that keep's first column speaks of.
        decision: as the layer made it, for the rows it saw.
        keep: (B, ..., units) in the whole batch: 0 for rows that never arrived.
        place: which units were running around it.
    """

    name: str
    first: int
    decision: Decision
    keep: Tensor
    place: "Place"

    @property
    def within(self) -> tuple[tuple[str, int], ...]:
        """The units that were running around it, outermost first, as (layer's name, unit).

        Prefer `around` and `innermost`: for a Halt of many steps this tuple is long.
        """
        units, place = [], self.place
        while place.outer is not None:
            units.append((place.layer, place.unit))
            place = place.outer
        return tuple(reversed(units))

    @property
    def around(self) -> Mapping[str, int]:
        """Of every layer that was running around it, by name, the highest unit."""
        return self.place.highest

    @property
    def innermost(self) -> tuple[str, int] | None:
        """The last of `within`; None outside of all units."""
        return None if self.place.outer is None else (self.place.layer, self.place.unit)


class Place:
    """Inside which units something happens: the innermost one, and the place it lies in itself.

    Args:
        layer: the name of the innermost unit's layer.
        unit: the innermost unit.
        outer: where that layer runs; None of the place outside of all units.
    """

    __slots__ = ("highest", "layer", "outer", "unit")

    def __init__(self, layer: str = "", unit: int = -1, outer: "Place | None" = None) -> None:
        self.layer = layer
        self.unit = unit
        self.outer = outer
        self.highest: dict[str, int] = {}
        if outer is not None:
            self.highest = {**outer.highest, layer: max(unit, outer.highest.get(layer, unit))}


class Trace:
    """The decisions of one forward pass.

    A layer that is called n times (a shared cell, a time step) is logged n times; `trace[name]` lists its keeps in
    order. `trace.answers[name]` holds the answers of a Halt's steps, for the rows that reached them. In training the
    keeps carry gradients, and those of a layer inside another reach the outer gate too.
    """

    def __init__(self, names: Mapping[Any, str]) -> None:
        self.names = names
        self.frames: list[Frame] = []
        self.calls: list[Call] = []
        self.answers: dict[str, list[Any]] = {}
        self._opened: list[_Opened] = []

    def log(self, layer: nn.Module, decision: Decision, first: int) -> None:
        """Remember a decision, placed in the whole batch through the open frames."""
        keep, here = decision.keep, self._here()
        for frame in reversed(here.home):
            keep = frame.home(keep)
        self.calls.append(Call(self.names[layer], first, decision, keep, here.place))

    def log_answer(self, layer: nn.Module, answer: Any) -> None:
        """Remember the answer of a Halt's step."""
        self.answers.setdefault(self.names[layer], []).append(answer)

    def __getitem__(self, name: str) -> list[Tensor]:
        if name not in self.names.values():
            raise KeyError(f"{name!r} is not a dynamic layer of this model; there are {sorted(self.names.values())}")
        return [call.keep for call in self.calls if call.name == name]

    def one(self, kind: type[L], name: str | None = None) -> tuple[L, str]:
        """The one layer of a kind and its name, whether or not it ran.

        Args:
            kind: a class of layers.
            name: of the layer; None where the model has only one of this kind.

        Raises:
            StructureError: there is none, there are several and none is named, or none has this name.
        """
        found = self.all(kind)
        if name is None and len(found) > 1:
            raise StructureError(f"the model has {len(found)} {kind.__name__} layers; name one of {sorted(found)}")
        name = next(iter(found)) if name is None else name
        if name not in found:
            raise StructureError(f"no {kind.__name__} is named {name!r}; name one of {sorted(found)}")
        return found[name], name

    def all(self, kind: type[L]) -> dict[str, L]:
        """The layers of a kind by name, whether or not they ran.

        Raises:
            StructureError: there is none.
        """
        found: dict[str, L] = {name: layer for layer, name in self.names.items() if isinstance(layer, kind)}
        if not found:
            raise StructureError(
                f"expected a model with {kind.__name__} layers; its dynamic layers are {sorted(self.names.values())}"
            )
        return found

    def decisions(self, kind: type[nn.Module]) -> list[Call]:
        """The decisions of all layers of a kind, in the order in which they were made.

        Raises:
            StructureError: no layer of this kind exists or made a decision.
        """
        names = self.all(kind)
        made = [call for call in self.calls if call.name in names]
        if not made:
            raise StructureError(
                f"no {kind.__name__} made a decision in this pass, only {self.keys()}; run the model inside "
                f"`with record(model) as trace`"
            )
        return made

    def complete(self, name: str) -> list[Call]:
        """The decisions of a layer, each made for every row of the batch.

        Raises:
            StructureError: rows that never arrived at the layer.
        """
        calls = [call for call in self.calls if call.name == name]
        if any(call.decision.keep.numel() != call.keep.numel() for call in calls):
            raise StructureError(_only_some(name))
        return calls

    def full_pass(self, name: str, rows: int | None = None) -> tuple[list[Call], list[Any]]:
        """The decisions and the answers of a Halt in one pass in which every row took every step.

        Args:
            name: of the Halt.
            rows: how many rows the batch has; None for as many as took the first step.

        Returns:
            One decision per step but the last, one answer per step.

        Raises:
            StructureError: the Halt did not run or ran several times, or rows left it early.
        """
        calls = self.complete(name)
        answers = self.answers.get(name, [])
        seen = {answer.shape[0] for answer in answers}
        if len(answers) != len(calls) + 1 or len(seen) != 1 or rows not in (None, *seen):
            raise StructureError(
                f"{name!r} gave {len(answers)} answers and made {len(calls)} decisions; expected one pass in which "
                f"every row takes every step: use train mode, or the dense form (`execute(model, sparse=False)`)"
            )
        return calls, answers

    def exits(self, rows: int, name: str | None = None) -> list[Any]:
        """The answers of all steps of a Halt, each for every row of the batch.

        Args:
            rows: how many rows the batch has.
            name: of the Halt; None where only one answered.

        Raises:
            StructureError: none answered, several did and none is named, or an answer has other rows.
        """
        if name is None and len(self.answers) == 1:
            name = next(iter(self.answers))
        if name is None or name not in self.answers:
            raise StructureError(
                f"expected the exits of {'one Halt' if name is None else repr(name)}, and those of "
                f"{sorted(self.answers)} answered; name one of these"
            )
        if any(answer.shape[0] != rows for answer in self.answers[name]):
            raise StructureError(_only_some(name))
        return self.answers[name]

    def runs(self, name: str, unit: int | None = 0) -> Tensor:
        """How often a unit of a layer ran for every row, (B, ...): for layers that are called again and again.

        Args:
            name: of the layer.
            unit: which; None for all of them together.

        Raises:
            StructureError: the unit was not decided about in this pass.
        """
        calls = [call for call in self.calls if call.name == name]
        if unit is None:
            columns = [call.keep.sum(-1) for call in calls]
        else:
            columns = [
                call.keep[..., unit - call.first]
                for call in calls
                if call.first <= unit < call.first + call.keep.shape[-1]
            ]
        if not columns:
            raise StructureError(
                f"{name!r} did not run in this pass; run the model inside `with record(model) as trace`"
            )
        return torch.stack(columns).sum(0)

    def keys(self) -> list[str]:
        """The names of the layers that decided, in the order of their first call."""
        return list(dict.fromkeys(call.name for call in self.calls))

    def _here(self) -> "_Opened":
        """What the open frames come to. Made once for each: a Halt of n steps has n of them open at its end."""
        opened = self._opened
        while opened and (len(opened) > len(self.frames) or opened[-1].frame is not self.frames[len(opened) - 1]):
            opened.pop()
        for frame in self.frames[len(opened) :]:
            below = opened[-1] if opened else _OUTSIDE
            both = below.home[-1].with_inner(frame) if below.home else None
            home = (*below.home, frame) if both is None else (*below.home[:-1], both)
            opened.append(_Opened(frame, home, Place(self.names[frame.layer], frame.units.start, below.place)))
        return opened[-1] if opened else _OUTSIDE

    def __repr__(self) -> str:
        kept = {name: round(sum(k.mean().item() for k in self[name]) / len(self[name]), 3) for name in self.keys()}
        return f"Trace({len(self.calls)} decisions; mean keep {kept})"


class _Opened(NamedTuple):
    """A frame that is open with all that are open around it.

    Attributes:
        frame: the innermost; None where none is open.
        home: the frames that take a keep home, outermost first: all of them, those that can be made one made one.
        place: inside it.
    """

    frame: Frame | None
    home: tuple[Frame, ...]
    place: Place


_OUTSIDE = _Opened(None, (), Place())


def _only_some(name: str) -> str:
    return (
        f"only some rows reached {name!r}; expected every row at every step: use train mode, or the dense form "
        f"(`execute(model, sparse=False)`)"
    )
