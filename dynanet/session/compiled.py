"""The parts of a deployed model: Halts and static modules whose work is done by engines."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dynanet.core.dynamic import Dynamic
from dynanet.core.halt import Halt
from dynanet.core.rows import Leading, over_tensors, take_rows
from dynanet.core.serving import PartByPart
from dynanet.session.engines import Engine
from dynanet.session.pytree import Layout, tensors_of


class Workspaces(Leading):
    """Leading rows, gathered into buffers that are allocated once and written again in every pass."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int, torch.Size, torch.dtype], Tensor] = {}
        self._takes = 0

    def begin(self) -> None:
        """A new pass: what the last one took may be overwritten."""
        self._takes = 0

    def take(self, x: Any, lead: tuple[int, ...], index: Tensor) -> Any:
        """The rows at `index`. Valid until the next pass: what a step hands on as it came is gathered again."""
        self._takes += 1
        if isinstance(x, list):  # the state of a CompiledHalt: no tree to flatten
            return [self._row(i, t, index) for i, t in enumerate(x)]
        leaves, structure = tree_flatten(x)
        return tree_unflatten([self._row(i, t, index) for i, t in enumerate(leaves)], structure)

    def _row(self, place: int, t: Any, index: Tensor) -> Any:
        if not isinstance(t, Tensor) or index.numel() == t.shape[0]:
            return t
        if not t.is_contiguous() or t.device.type != "cpu":
            return take_rows(t, index)
        key = (self._takes, place, t.shape[1:], t.dtype)
        if key not in self._buffers or self._buffers[key].shape[0] < index.numel():
            self._buffers[key] = t.new_empty(t.shape[0], *t.shape[1:])
        return torch.index_select(t, 0, index, out=self._buffers[key][: index.numel()])


class CompiledHalt(Halt):
    """A Halt whose steps are engines. Its state is a flat list of tensors, with the step's score at the end.

    Attributes:
        engines: per step, by batch size.
        source: the Halt it runs; asked for its rule, so that thresholds stay where they are.
    """

    if TYPE_CHECKING:
        source: Halt

    def __init__(
        self, source: Halt, engines: "list[EnginesByBatch]", states: "list[Layout]", answers: "list[Layout]"
    ) -> None:
        super().__init__()
        vars(self)["source"] = source  # not registered: there is one layer here, not two
        self.engines, self._states, self._answers = engines, states, answers
        self.steps, self.limit, self._workspaces = source.steps, source.limit, Workspaces()
        self.rows = self._workspaces

    def forward(self, x: Any) -> Any:
        """Every row's answer, in memory of its own: what engines write lies in workspaces."""
        alone = (x if isinstance(x, Tensor) else tensors_of(x)[0]).shape[0] == 1
        answer = self._alone(x) if alone and self.trace is None and self.force is None else super().forward(x)
        return over_tensors(torch.clone, answer)

    def _alone(self, x: Any) -> Any:
        """One row either leaves or goes on: there is nothing to gather or put back."""
        state = self.start(x)
        last = (self.steps if self.limit is None else min(self.limit, self.steps)) - 1
        for k in range(last):
            state, answer = self.step(k, state)
            if not self.source.should_continue_one(k, self.score(k, state, answer)):
                return answer
        return self.step(last, state)[1]

    def start(self, x: Any) -> list[Tensor]:
        """The tensors of the source's first state."""
        self._workspaces.begin()
        return tensors_of(self.source.start(x))

    def step(self, k: int, state: list[Tensor]) -> tuple[list[Tensor], Any]:
        """One engine call: state, answer and score."""
        outputs = self.engines[k](state)
        if self.trace is not None:  # a trace outlives the pass
            outputs = [t.clone() for t in outputs]
        states, answers = self._states[k].tensors, self._answers[k].tensors
        answer = self._answers[k].filled(outputs[states : states + answers])
        return [*outputs[:states], *outputs[states + answers :]], answer

    def score(self, k: int, state: list[Tensor], answer: Any) -> Tensor:
        """Computed with the step."""
        return state.pop()

    def should_continue(self, k: int, score: Tensor) -> Tensor:
        """The source's rule."""
        return self.source.should_continue(k, score)


class BatchOnePath:
    """A Halt whose rows are made of parts, run by one engine per step where there is only one row. Nobody may look on:
    what is recorded or forced takes the usual way. Its graphs hold the weights of the steps a second time.

    Attributes:
        engines: per step.
    """

    def __init__(self, halt: Halt, engines: "list[EnginesByBatch]") -> None:
        assert isinstance(halt, PartByPart)
        self._halt, self._parts, self.engines = halt, halt.parts, engines
        self._layers = [module for module in halt.modules() if isinstance(module, Dynamic)]

    def serves(self, x: Any) -> bool:
        """One row, and nobody looks on."""
        if x.shape[0] != 1:
            return False
        for layer in self._layers:  # a generator would cost more: beside one row that counts
            if layer.trace is not None or layer.force is not None:
                return False
        return True

    def __call__(self, x: Any) -> Any:
        """The answer for one row."""
        halt, parts = self._halt, self._parts(x)
        last = (halt.steps if halt.limit is None else min(halt.limit, halt.steps)) - 1
        for k, engine in enumerate(self.engines):
            answer, *rest = engine([parts])
            if k == last:
                break
            score, parts = rest
            if not halt.should_continue_one(k, score):
                break
        return answer[:1].clone()


class Unit(nn.Module):
    """A static part of a model, run by an engine in the model's place."""

    if TYPE_CHECKING:
        module: nn.Module

    def __init__(self, module: nn.Module, engine: "EnginesByBatch", inputs: Sequence[Tensor], structure: Any) -> None:
        super().__init__()
        self.engine, self._structure = engine, structure
        self._takes = [(t.shape[1:], t.dtype) for t in inputs]
        vars(self)["module"] = module  # not registered: its weights are in the engine

    def forward(self, *args: Any) -> Any:
        """As the part it stands for; that itself runs what comes in another size."""
        # One tensor, as nearly always, needs no pytree: with few rows that counts.
        inputs = list(args) if len(args) == 1 and isinstance(args[0], Tensor) else tensors_of(args)
        if [(t.shape[1:], t.dtype) for t in inputs] != self._takes:
            return self.module(*args)
        if inputs[0].shape[0] == 0:
            return self.engine.empty(self._structure)
        outputs = self.engine(inputs)
        return outputs[0] if self._structure.is_leaf() else tree_unflatten(outputs, self._structure)


class EnginesByBatch:
    """A unit's engines: the one that was fastest at the nearest batch size runs.

    Attributes:
        engines: by batch size.
        listener: is shown the inputs of every call, for measuring.
    """

    def __init__(self, engines: dict[int, Engine], outputs: Sequence[Tensor]) -> None:
        self.engines = engines
        self.listener: Callable[[Sequence[Tensor]], None] | None = None
        self._sizes = sorted(engines)
        self._empty = list(outputs)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The unit's outputs."""
        if self.listener is not None:
            self.listener(inputs)
        rows = inputs[0].shape[0]
        nearest = self._sizes[0]
        for size in self._sizes[1:]:
            if rows * rows >= nearest * size:  # the geometric middle between two sizes
                nearest = size
        return self.engines[nearest](inputs)

    def empty(self, structure: Any) -> Any:
        """The answer for no rows."""
        return tree_unflatten(self._empty, structure)
