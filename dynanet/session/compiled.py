"""Compiled parts of a model: Halts and static modules whose work is done by engines."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dynanet.core.dynamic import Dynamic
from dynanet.core.halt import Halt
from dynanet.core.rows import LEADING, LeadingAnswers, over_tensors, take_rows
from dynanet.session.plan import Plan, PlannedHalt, PlannedPart
from dynanet.session.pytree import tensors_of
from dynanet.session.selector import EnginesByBatch, EngineSelector


def compiled(model: nn.Module, plan: Plan, selector: EngineSelector) -> nn.Module:
    """Replace what a plan names by its engines.

    Args:
        model: the plan's; changed in place unless it is replaced as a whole.
        plan: its halts and parts.
        selector: of the engines.
    """
    replaced: dict[str, nn.Module] = {}
    for name, halt in plan.halts.items():
        replaced[name] = CompiledHalt(halt, [selector.engines(unit) for unit in halt.steps])
    for name, part in plan.parts.items():
        replaced[name] = CompiledPart(part, selector.engines(part.unit))
    if "" in replaced:
        return replaced[""]
    for name, module in replaced.items():
        model.set_submodule(name, module)
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    """Copy a compiled model without its engines: with the layers that they run in their place.

    Args:
        model: the answer of `compiled`; not changed.
    """
    memo: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, CompiledHalt):
            memo[id(module)] = copy.deepcopy(module.source, memo)
        elif isinstance(module, CompiledPart):
            memo[id(module)] = copy.deepcopy(module.module, memo)
    return copy.deepcopy(model, memo)


class Workspaces(LeadingAnswers):
    """Leading rows, gathered into buffers that are allocated once and written again in every pass."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int, torch.Size, torch.dtype], Tensor] = {}
        self._takes = 0

    def begin(self) -> None:
        """Start a pass: buffers of the last one may be overwritten."""
        self._takes = 0

    def whole(self, x: Any, lead: tuple[int, ...]) -> Any:
        """All rows, (rows, ...)."""
        return LEADING.whole(x, lead)

    def take(self, x: Any, lead: tuple[int, ...], index: Tensor) -> Any:
        """The rows at `index`, valid until the next pass.

        Every step gathers again, also what the step before returned unchanged.
        """
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
        source: the Halt that it runs; its rule decides, so that thresholds are read where they were set.
    """

    if TYPE_CHECKING:
        source: Halt

    def __init__(self, planned: PlannedHalt, engines: list[EnginesByBatch]) -> None:
        super().__init__()
        vars(self)["source"] = planned.halt  # not registered: there is one layer here, not two
        self.engines = engines
        self.steps = planned.halt.steps
        self.limit = planned.halt.limit
        self._states = planned.states
        self._answers = planned.answers
        self._workspaces = Workspaces()
        self.rows = self._workspaces

    def forward(self, x: Any) -> Any:
        """Every row's answer, in its own memory: what engines write lies in workspaces."""
        single = (x if isinstance(x, Tensor) else tensors_of(x)[0]).shape[0] == 1
        if single and self.trace is None and self.force is None:
            answer = self._one_row(x)
        else:
            answer = super().forward(x)
        return over_tensors(torch.clone, answer)

    def _one_row(self, x: Any) -> Any:
        """The answer for one row, which either leaves or goes on: nothing is gathered or scattered."""
        state = self.start(x)
        last = self.last
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
        """Call one engine for state, answer and score."""
        outputs = self.engines[k](state)
        if self.trace is not None:  # a trace outlives the pass
            outputs = [t.clone() for t in outputs]
        first = self._states[k]
        end = first + self._answers[k].tensors
        return [*outputs[:first], *outputs[end:]], self._answers[k].filled(outputs[first:end])

    def score(self, k: int, state: list[Tensor], answer: Any) -> Tensor:
        """The score, which was computed with the step."""
        return state.pop()

    def should_continue(self, k: int, score: Tensor) -> Tensor:
        """The source's rule."""
        return self.source.should_continue(k, score)


class BatchOnePath:
    """A Halt whose rows are made of parts, run by one engine per step where there is only one row.

    A call that is recorded or forced runs as in a batch. The engines' graphs hold the weights of the steps a second
    time: 4 bytes per float32 parameter of all steps, embeddings excluded.

    Args:
        halt: with a `part_by_part`.
        engines: per step.
    """

    def __init__(self, halt: Halt, engines: list[EnginesByBatch]) -> None:
        assert halt.part_by_part is not None
        self.engines = engines
        self._halt = halt
        self._part_by_part = halt.part_by_part
        self._layers = [module for module in halt.modules() if isinstance(module, Dynamic)]

    def serves(self, x: Any) -> bool:
        """Whether x is one row, and no layer is recorded or forced."""
        if x.shape[0] != 1:
            return False
        for layer in self._layers:  # slower as a generator, which shows beside a single row
            if layer.trace is not None or layer.force is not None:
                return False
        return True

    def __call__(self, x: Any) -> Any:
        """The answer for one row."""
        halt = self._halt
        parts = self._part_by_part.parts(halt, x)
        last = halt.last
        for k, engine in enumerate(self.engines):
            answer, *rest = engine([parts])
            if k == last:
                break
            score, parts = rest
            if not halt.should_continue_one(k, score):
                break
        return answer[:1].clone()


class CompiledPart(nn.Module):
    """A static part of a model, run by an engine in the model's place."""

    if TYPE_CHECKING:
        module: nn.Module

    def __init__(self, part: PlannedPart, engine: EnginesByBatch) -> None:
        super().__init__()
        vars(self)["module"] = part.module  # not registered: its weights are in the engine
        self.engine = engine
        self._structure = part.structure
        self._takes = self._sizes(part.unit.inputs)

    def forward(self, *args: Any) -> Any:
        """The part's answer. Inputs of another size than planned run in the part itself."""
        # One tensor, the usual case, needs no pytree: with few rows the difference shows.
        inputs = list(args) if len(args) == 1 and isinstance(args[0], Tensor) else tensors_of(args)
        if self._sizes(inputs) != self._takes:
            return self.module(*args)
        if inputs[0].shape[0] == 0:
            return self.engine.empty(self._structure)
        outputs = self.engine(inputs)
        return outputs[0] if self._structure.is_leaf() else tree_unflatten(outputs, self._structure)

    @staticmethod
    def _sizes(tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
        return [(t.shape[1:], t.dtype) for t in tensors]
