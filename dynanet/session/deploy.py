"""Deployment: which parts of a model are static, and which engine runs each fastest."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dynanet.core.dynamic import Dynamic, everything, execute, forced
from dynanet.core.errors import MissingExtraError, StructureError
from dynanet.core.halt import Halt
from dynanet.core.rows import over_tensors
from dynanet.core.serving import PartByPart
from dynanet.session.compiled import BatchOnePath, CompiledHalt, EnginesByBatch, Unit
from dynanet.session.engines import Eager, OnnxRuntime, fastest, onnx_runtime
from dynanet.session.pytree import Layout, tensors_of

log = logging.getLogger(__name__)

_CHUNKS = (4, 16)
_MOST_ROWS, _MOST_BYTES = 256, 32 * 2**20  # beyond these a row costs what it costs at them


class Plan:
    """Which engines to try for a unit, and what they measured."""

    def __init__(
        self, engines: str, batches: tuple[int, ...], threads: int, cache: Path | None, device: torch.device
    ) -> None:
        usable = device.type == "cpu" and engines != "eager" and onnx_runtime() is not None
        self.eager = engines != "onnxruntime" or not usable
        self.onnx, self.batches, self.threads, self.cache = usable, batches, threads, cache
        self.measured: dict[str, dict[int, dict[str, float]]] = {}

    def engine(
        self, name: str, unit: nn.Module, inputs: Sequence[Tensor], *, workspaces: bool, divisible: bool = True
    ) -> EnginesByBatch:
        """Engines for a unit, from the rows that one sample sends through it. If these are not `divisible`, they see
        each other: all of one sample's run together, and nobody else's.
        """
        per_sample, few = inputs[0].shape[0], [t[:2] for t in inputs]
        few = [_repeated(t, 2) if t.shape[0] == 1 else t for t in few]
        eager, outputs = Eager(unit), [t[:0] for t in unit(*few)]
        if not self.onnx:
            return EnginesByBatch({1: eager}, outputs)
        try:
            onnx = OnnxRuntime(unit, few, threads=self.threads, workspaces=workspaces, cache=self.cache)
        except (MissingExtraError, StructureError) as error:
            if not self.eager:
                raise
            log.warning("%s runs eager: %s", name or "the model", error)
            self.onnx = not isinstance(error, MissingExtraError)
            return EnginesByBatch({1: eager}, outputs)
        best, self.measured[name] = {}, {}
        row_bytes = sum(t[:1].numel() * t.element_size() for t in few)
        for batch in self.batches if divisible else (1,):
            rows = max(1, min(batch * per_sample, _MOST_ROWS, _MOST_BYTES // row_bytes))
            chunked = [onnx.chunked(n) for n in _CHUNKS if divisible and n < rows]
            engines = [*([eager] if self.eager else []), onnx, *chunked]
            many = [_repeated(t[:1], rows) for t in few]
            best[rows], ms = fastest(engines, many, threads=self.threads)
            self.measured[name][batch] = {engine: time * batch * per_sample / rows for engine, time in ms.items()}
        return EnginesByBatch(best, outputs)


def _repeated(t: Tensor, times: int) -> Tensor:
    """Laid out as it was: an engine that wants images laid out otherwise pays for it."""
    last = t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return t.repeat(times, *[1] * (t.dim() - 1)).contiguous(memory_format=layout)


class _Step(nn.Module):
    """Step k of a Halt as a function of flat tensors: (state..., answer..., score); the last step answers only.

    What is no tensor in the state (a size, None) stays as it was when the step was made.
    """

    def __init__(self, halt: Halt, k: int, state: "Layout") -> None:
        super().__init__()
        self.halt, self.k, self._state = halt, k, state

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        state, answer = self.halt.step(self.k, self._state.filled(flat))
        if self.k + 1 == self.halt.steps:
            return tuple(tensors_of(answer))
        return (*tensors_of(state), *tensors_of(answer), self.halt.score(self.k, state, answer))


class _Part(nn.Module):
    """A static submodule as a function of flat tensors."""

    def __init__(self, module: nn.Module, structure: Any) -> None:
        super().__init__()
        self.module, self._structure = module, structure

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.module(*tree_unflatten(list(flat), self._structure))))


def deploy(model: nn.Module, example: Any, plan: Plan) -> nn.Module:
    """The model with its static parts replaced by engines."""
    if not _dynamic_inside(model):
        return _unit("", model, (example,), plan) or model
    seen: dict[str, tuple[Any, ...]] = {}
    named: set[str] = set()  # called with arguments by name, which engines do not take

    def see(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(name, args)
        if kwargs:
            named.add(name)

    parts = dict(_static_parts(model))
    halts = {
        name: m for name, m in model.named_modules() if isinstance(m, Halt) and not _dynamic_inside(m, itself=False)
    }
    handles = [
        module.register_forward_pre_hook(lambda m, args, kwargs, name=name: see(name, args, kwargs), with_kwargs=True)
        for name, module in {**parts, **halts}.items()
    ]
    with forced(model, everything):
        execute(model, sparse=True)(example)
    for handle in handles:
        handle.remove()
    halts = {name: halt for name, halt in halts.items() if name in seen and name not in named}
    for name, halt in halts.items():
        staged = _staged(name, halt, over_tensors(lambda t: t[:_MOST_ROWS], seen[name][0]), plan)
        if not name:
            return staged
        model.set_submodule(name, staged)
    inside = tuple(f"{name}." for name in halts)
    for name, args in seen.items():
        if name in parts and name not in named and not name.startswith(inside):
            unit = _unit(name, model.get_submodule(name), args, plan)
            if unit is not None:
                model.set_submodule(name, unit)
    return model


def one_row(halt: Halt, example: Any, plan: Plan) -> BatchOnePath | None:
    """One row of the model by itself, where the model offers that and there is an engine besides torch."""
    if not isinstance(halt, PartByPart) or not plan.onnx:
        return None
    execute(halt, sparse=True)
    engines, parts = [], halt.parts(example)
    for k in range(halt.steps):
        unit = halt.one_row(k)
        if unit is None:
            return None
        engines.append(plan.engine(f"step{k}, one row", unit, [parts], workspaces=True, divisible=False))
        parts = unit(parts)[-1]
    return BatchOnePath(halt, engines)


def _staged(name: str, halt: Halt, x: Any, plan: Plan) -> CompiledHalt:
    engines, states, answers, state = [], [], [], halt.start(x)
    for k in range(halt.steps):
        unit = _Step(halt, k, Layout(state))
        engines.append(plan.engine(f"{name}.step{k}".strip("."), unit, tensors_of(state), workspaces=True))
        state, answer = halt.step(k, state)
        states.append(Layout(state if k + 1 < halt.steps else ()))
        answers.append(Layout(answer))
    return CompiledHalt(halt, engines, states, answers)


def _unit(name: str, module: nn.Module, args: tuple[Any, ...], plan: Plan) -> Unit | None:
    """The part with its engines; None if it takes or answers something else than rows, and has to stay as it is."""
    flat, structure = tree_flatten(args)
    if not flat or not all(isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] for leaf in flat):
        return None
    answer, layout = tree_flatten(module(*args))
    rows = flat[0].shape[0]
    if not all(isinstance(t, Tensor) and t.dim() and t.shape[0] == rows for t in (*flat, *answer)):
        return None
    return Unit(module, plan.engine(name, _Part(module, structure), flat, workspaces=False), flat, layout)


def _static_parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest submodules with nothing dynamic inside. Looked into are containers that are never called, and what
    holds a module that is used by other methods than `forward` and says so (`called_in_parts`): engines have none. What
    is one native call stays as it is, and says so too (`runs_whole`).
    """
    if getattr(model, "runs_whole", False):
        return
    for name, child in model.named_children():
        looked_into = isinstance(child, nn.ModuleList | nn.ModuleDict) or any(
            getattr(module, "called_in_parts", False) for module in child.modules()
        )
        if _dynamic_inside(child) or looked_into:
            yield from _static_parts(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield f"{prefix}{name}", child


def _dynamic_inside(module: nn.Module, *, itself: bool = True) -> bool:
    return any(isinstance(m, Dynamic) and (itself or m is not module) for m in module.modules())
