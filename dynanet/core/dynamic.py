"""A Dynamic layer runs a unit only for the rows that keep it: masking (dense) or gathering (sparse)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.rows import LEADING, Rows
from dynanet.core.trace import Frame, Trace

if TYPE_CHECKING:
    from dynanet.core.objective import Objective


class Kept:
    """The rows that keep a unit: `take` them, compute, `put` the answer back."""

    def __init__(self, rows: Rows, lead: tuple[int, ...], keep: Tensor, index: Tensor | None) -> None:
        self.rows = rows
        self.lead = lead
        self.keep = keep
        self.index = index

    @property
    def empty(self) -> bool:
        """Whether no row keeps the unit, so that it need not be called. Always False in the dense form."""
        return self.index is not None and self.index.numel() == 0

    def take(self, x: Any) -> Any:
        """The rows of x that the unit sees."""
        if self.index is None:
            return self.rows.whole(x, self.lead)
        return self.rows.take(x, self.lead, self.index)

    def call(self, unit: Callable, x: Any) -> Any:
        """Run the unit on its rows of x."""
        return unit(self.take(x)) if self.index is None else self.rows.call(unit, self.take(x))

    def frame(self, layer: "Dynamic", unit: int) -> Frame:
        """Where these rows lie, for the trace."""
        mask = self.keep if self.index is None else None
        return Frame(layer, range(unit, unit + 1), self.lead, self.index, mask, self.rows.flat)

    def put(self, y: Any, otherwise: Any) -> Any:
        """The unit's answer y where it ran, `otherwise` elsewhere."""
        if self.index is None:
            return self.rows.mask(y, self.lead, self.keep, otherwise)
        return self.rows.put(y, self.lead, self.index, otherwise)


class Dynamic(nn.Module):
    """A layer that decides. Its units are callables, and `run` is the way to call one.

    A mechanism makes a decision, obeys what `tap` returns, and calls its units through `run`; nesting, the trace, the
    prices and the sparse form follow from that.

    Attributes:
        sparse: gather the kept rows and compute nothing else, instead of computing all and masking. Set it with
            `execute`. In training the dense form is used whatever is set: gradients of a gate need what was not kept.
        degree: the price of a unit is a polynomial of this degree in the number of rows that keep it, without constant
            term. 1 nearly always; 2 for attention among the kept tokens.
        most: how many units a row runs at most, where units exclude each other: 1 for widths. None: any number.
        skippable: it runs or skips one unit as a whole, so that training can bring it to a rate (`train.TargetRate`).
    """

    sparse: bool = False
    degree: int = 1
    max_units: int | None = None
    skippable: bool = False
    trace: Trace | None = None
    force: Callable[[Decision], Tensor] | None = None

    @property
    def decides(self) -> str:
        """Eval-mode decision settings that are not in the state dict, in words; "" if there are none.

        A checkpoint stores them, and is refused by a layer that would decide otherwise.
        """
        return ""

    @classmethod
    def ponder_cost(cls) -> "Objective | None":
        """One objective that makes the rows of all such layers in a model stop. None: theirs do not stop."""
        return None

    def pixel_loss(self, ignore: int, weights: Sequence[float] | None) -> "Objective | None":
        """The loss of a model that is this layer and labels pixels. None: the cross-entropy of its answer.

        Args:
            ignore: the label of void pixels.
            weights: one per exit; None for equal ones.
        """
        return None

    def schedules(self) -> list[Callable[[float], None]]:
        """Settings of this layer that change with the progress of training, from 0 to 1; for `train.fit`."""
        return []

    def finish_training(self) -> None:
        """Reset what `schedules` left, so that every row runs everything until the layer is calibrated."""

    @property
    def runs_whole(self) -> bool:
        """The sparse form is one native call as things are, so that engines for its parts would only slow it down."""
        return False

    @property
    def gathers(self) -> bool:
        """Whether the sparse form is in use."""
        return self.sparse and not self.training

    def tap(
        self, decision: Decision, first: int = 0, pinned: Tensor | None = None, present: Tensor | None = None
    ) -> Decision:
        """Record a decision and return the one to follow: `forced` may have replaced it.

        Args:
            decision: keep is (rows..., units).
            first: the unit of keep's first column, for layers that decide one unit after another.
            pinned: 1 where a unit stays kept whatever is forced (the CLS token, a first stage).
            present: 0 where there is nothing left to keep, whatever is forced (a token dropped before, a position that
                has halted).
        """
        decision = self.apply_override(decision, pinned, present)
        self.log(decision, first)
        return decision

    def apply_override(
        self, decision: Decision, pinned: Tensor | None = None, present: Tensor | None = None
    ) -> Decision:
        """Return the decision to follow: the override if one is set, else the gate's. The first half of `tap`.

        For layers whose trace counts other units than their gate (blocks of a weight matrix instead of channels).
        """
        keep = decision.keep if self.force is None else self.force(decision).to(decision.keep)
        if pinned is not None:
            keep = torch.maximum(keep, pinned)
        if present is not None:
            keep = keep * present
        return Decision(keep, decision.score)

    def log(self, decision: Decision, first: int = 0) -> None:
        """Add the decision to the trace, if one is open. The second half of `tap`."""
        if self.trace is not None:
            self.trace.log(self, decision, first)

    @contextmanager
    def within(self, frame: Frame) -> Iterator[None]:
        """Attribute what is decided and computed inside to the frame's units.

        For layers with their own kernel, which branch on `gathers` instead of calling `run`.
        """
        if self.trace is None:
            yield
            return
        self.trace.frames.append(frame)
        try:
            yield
        finally:
            self.trace.frames.pop()

    @contextmanager
    def only(self, unit: int, keep: Tensor, rows: Rows = LEADING) -> Iterator[Kept]:
        """Open the rows that keep a unit: `take` them, compute, `put` the answer back.

        Args:
            unit: the unit that runs inside.
            keep: (rows...), without a unit axis.
            rows: how rows are gathered and scattered.
        """
        kept = self.kept(keep, rows)
        with self.within(kept.frame(self, unit)):
            yield kept

    def kept(self, keep: Tensor, rows: Rows = LEADING) -> "Kept":
        """The rows that keep a unit, without a frame, for layers that open one themselves."""
        lead, flat = tuple(keep.shape), keep.flatten()
        return Kept(rows, lead, flat, flat.nonzero().squeeze(1) if self.gathers else None)

    def run(self, unit: int, f: Callable, keep: Tensor, x: Any, otherwise: Any, rows: Rows = LEADING) -> Any:
        """Return f(x) for the rows with keep = 1, `otherwise` elsewhere. A unit that no row keeps is not called.

        Args:
            unit: which unit f is.
            f: from the rows of x to rows of the answer.
            keep: (rows...), without a unit axis.
            x: a pytree whose tensors hold the rows.
            otherwise: a pytree shaped as the answer.
            rows: how rows are gathered and scattered.
        """
        with self.only(unit, keep, rows) as kept:
            if kept.empty:
                return otherwise
            y = kept.call(f, x)
        return kept.put(y, otherwise)

    def price(self, keep: Tensor, unit_macs: Tensor) -> Tensor:
        """MACs of the kept units per sample, (B,).

        Args:
            keep: (B, ..., units), in the whole batch.
            unit_macs: (units,) MACs of one row; (units, degree) where `degree` > 1, one column per power of the number
                of kept rows.
        """
        return (keep.to(unit_macs) * unit_macs).flatten(1).sum(1)


def layers(model: nn.Module) -> dict[str, Dynamic]:
    """The dynamic layers of a model by name, outermost first. The model itself has the name ''."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Dynamic)}


def execute(model: nn.Module, *, sparse: bool) -> nn.Module:
    """Choose how a model runs in eval mode: gathering the kept rows (sparse) or masking (dense). Returns the model."""
    for layer in layers(model).values():
        layer.sparse = sparse
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the block, and restore the mode of every module after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def forced(model: nn.Module, keep: Callable[[Decision], Tensor]) -> Iterator[None]:
    """Replace every decision of a model: for prices, replays, tests at every depth, what-if questions.

    Args:
        model: whose decisions.
        keep: a row-wise function of the decision that answers the keep to obey.
    """
    affected = list(layers(model).values())
    before = [layer.force for layer in affected]
    for layer in affected:
        layer.force = keep
    try:
        yield
    finally:
        for layer, was in zip(affected, before, strict=True):
            layer.force = was


def everything(decision: Decision) -> Tensor:
    """Keep every unit for every row; for `forced`."""
    return torch.ones_like(decision.keep)


@contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Record the decisions that a model makes.

    Example:
        >>> with record(model) as trace:        # doctest: +SKIP
        ...     model(x)
        >>> trace["layer1"][0].shape            # doctest: +SKIP

    Raises:
        RuntimeError: the model is being recorded already.
    """
    names = {layer: name for name, layer in layers(model).items()}
    if any(layer.trace is not None for layer in names):
        raise RuntimeError("this model is being recorded already; use the trace that is open, or close it first")
    trace = Trace(names)
    for layer in names:
        layer.trace = trace
    try:
        yield trace
    finally:
        for layer in names:
            layer.trace = None
