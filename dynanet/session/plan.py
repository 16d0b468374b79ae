"""The plan of a session: which parts of a model are static, and what they take. Nothing is built or timed here."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dynanet.core.dynamic import Dynamic, everything, execute, forced
from dynanet.core.halt import Halt
from dynanet.core.plain import Watcher, is_plain, is_sequential
from dynanet.core.rows import over_tensors
from dynanet.core.serving import CalledInParts
from dynanet.session.pytree import Layout, tensors_of

_MOST_ROWS = 256  # of a sample, to plan with


class StaticUnit(NamedTuple):
    """Something to be run by an engine.

    Attributes:
        name: in the model.
        function: from flat tensors, rows first, to flat tensors.
        inputs: the rows that one sample sends through it.
        workspaces: outputs may lie in memory that the next call overwrites.
        divisible: rows do not depend on each other, and may be run in any groups.
    """

    name: str
    function: nn.Module
    inputs: Sequence[Tensor]
    workspaces: bool
    divisible: bool = True


class PlannedHalt(NamedTuple):
    """A Halt with nothing dynamic inside: one unit per step.

    Attributes:
        halt: itself.
        steps: its units.
        states: tensors in the state after every step, 0 after the last.
        answers: the layout of every step's answer.
    """

    halt: Halt
    steps: list[StaticUnit]
    states: list[int]
    answers: list[Layout]


class PlannedPart(NamedTuple):
    """A static submodule.

    Attributes:
        module: itself.
        unit: what an engine runs.
        structure: the pytree of its answer.
    """

    module: nn.Module
    unit: StaticUnit
    structure: TreeSpec


class Plan(NamedTuple):
    """What of a model runs in engines; the rest stays the model's own Python.

    Attributes:
        one_row: a unit per step for a batch of one row; none where the model offers no such form.
        halts: compiled step by step, by name.
        parts: compiled as a whole, by name. None lies in one of the halts.
    """

    one_row: list[StaticUnit]
    halts: dict[str, PlannedHalt]
    parts: dict[str, PlannedPart]


def plan_units(model: nn.Module, example: Any, *, one_row: bool) -> Plan:
    """Find the largest static parts of a model, and run it once to see what they take.

    Args:
        model: in eval mode; a model with dynamic layers is left in the sparse form.
        example: an input of one sample.
        one_row: plan the form for a batch of one row too.
    """
    if not _dynamic_inside(model):
        part = _part("", model, (example,))
        return Plan([], {}, {"": part} if part is not None else {})
    execute(model, sparse=True)
    single = _one_row(model, example) if one_row else []
    parts = dict(_static_parts(model))
    halts = {
        name: m for name, m in model.named_modules() if isinstance(m, Halt) and not _dynamic_inside(m, itself=False)
    }
    seen = _arguments(model, example, {**parts, **halts})
    planned = {
        name: _halt(name, halt, over_tensors(lambda t: t[:_MOST_ROWS], seen[name][0]))
        for name, halt in halts.items()
        if name in seen
    }
    if "" in planned:
        return Plan(single, planned, {})
    inside = tuple(f"{name}." for name in planned)
    found = {
        name: _part(name, parts[name], args)
        for name, args in seen.items()
        if name in parts and not name.startswith(inside)
    }
    return Plan(single, planned, {name: part for name, part in found.items() if part is not None})


def folded(model: nn.Module) -> nn.Module:
    """Copy a model in eval mode, its batch norms folded into the convolutions before them (in a Sequential).

    Only plain layers are folded: a subclass or a hook may compute something else.
    """
    model = _copied(model).eval()
    for parent in list(model.modules()):
        if not is_sequential(parent):
            continue
        for i in range(len(parent) - 1):
            conv = parent[i]
            norm = parent[i + 1]
            if is_plain(conv, nn.Conv2d) and is_plain(norm, nn.BatchNorm2d) and _has_statistics(norm):
                parent[i] = fuse_conv_bn_eval(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm))
                parent[i + 1] = nn.Identity()
    return model.requires_grad_(False)


def _copied(model: nn.Module) -> nn.Module:
    # Weight norm and pruning keep computed weights, which torch does not copy as they hang on a graph.
    held = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in held if not t.is_leaf})


def _has_statistics(norm: nn.Module) -> bool:
    assert isinstance(norm, nn.BatchNorm2d)
    return norm.running_mean is not None and norm.running_var is not None


class _Step(nn.Module):
    """Step k of a Halt as a function of flat tensors: (state..., answer..., score); the last step answers only.

    What is not a tensor in the state (a size, None) is a constant of the step.
    """

    def __init__(self, halt: Halt, k: int, state: Layout) -> None:
        super().__init__()
        self.halt = halt
        self.k = k
        self._state = state

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        state, answer = self.halt.step(self.k, self._state.filled(flat))
        if self.k + 1 == self.halt.steps:
            return tuple(tensors_of(answer))
        return (*tensors_of(state), *tensors_of(answer), self.halt.score(self.k, state, answer))


class _Flat(nn.Module):
    """A static submodule as a function of flat tensors."""

    def __init__(self, module: nn.Module, structure: TreeSpec) -> None:
        super().__init__()
        self.module = module
        self._structure = structure

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.module(*tree_unflatten(list(flat), self._structure))))


def _arguments(model: nn.Module, example: Any, modules: dict[str, nn.Module]) -> dict[str, tuple[Any, ...]]:
    """Record the arguments of each module's first call, with everything kept.

    Modules that are called with arguments by name are left out, as engines do not take these.
    """
    seen: dict[str, tuple[Any, ...]] = {}
    named: set[str] = set()

    def see(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(name, args)
        if kwargs:
            named.add(name)

    handles = [
        module.register_forward_pre_hook(Watcher(partial(see, name)), with_kwargs=True)
        for name, module in modules.items()
    ]
    with forced(model, everything):
        model(example)
    for handle in handles:
        handle.remove()
    return {name: args for name, args in seen.items() if name not in named}


def _one_row(model: nn.Module, example: Any) -> list[StaticUnit]:
    """The steps of one row by itself, where the model offers that form."""
    if not isinstance(model, Halt) or model.part_by_part is None:
        return []
    units = []
    parts = model.part_by_part.parts(model, example)
    for k in range(model.steps):
        function = model.part_by_part.one_row(model, k)
        if function is None:
            return []
        units.append(StaticUnit(f"step{k}, one row", function, [parts], workspaces=True, divisible=False))
        parts = function(parts)[-1]
    return units


def _halt(name: str, halt: Halt, x: Any) -> PlannedHalt:
    planned = PlannedHalt(halt, [], [], [])
    state = halt.start(x)
    for k in range(halt.steps):
        function = _Step(halt, k, Layout(state))
        planned.steps.append(StaticUnit(f"{name}.step{k}".strip("."), function, tensors_of(state), workspaces=True))
        state, answer = halt.step(k, state)
        planned.states.append(len(tensors_of(state)) if k + 1 < halt.steps else 0)
        planned.answers.append(Layout(answer))
    return planned


def _part(name: str, module: nn.Module, args: tuple[Any, ...]) -> PlannedPart | None:
    """Plan a part; None if it takes or returns something else than rows."""
    flat, structure = tree_flatten(args)
    if not flat or not all(isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] for leaf in flat):
        return None
    answer, layout = tree_flatten(module(*args))
    rows = flat[0].shape[0]
    if not all(isinstance(t, Tensor) and t.dim() and t.shape[0] == rows for t in (*flat, *answer)):
        return None
    return PlannedPart(module, StaticUnit(name, _Flat(module, structure), flat, workspaces=False), layout)


def _static_parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the largest submodules with nothing dynamic inside.

    Containers that are never called are searched, and so is what holds a `CalledInParts`. A dynamic layer that is one
    native call (`Dynamic.runs_whole`) stays whole.
    """
    if isinstance(model, Dynamic) and model.runs_whole:
        return
    for name, child in model.named_children():
        searched = isinstance(child, nn.ModuleList | nn.ModuleDict) or any(
            isinstance(module, CalledInParts) for module in child.modules()
        )
        if _dynamic_inside(child) or searched:
            yield from _static_parts(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield f"{prefix}{name}", child


def _dynamic_inside(module: nn.Module, *, itself: bool = True) -> bool:
    return any(isinstance(m, Dynamic) and (itself or m is not module) for m in module.modules())
