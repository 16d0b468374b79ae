"""A Session runs a model for real: engines for what is static, compaction for what is decided."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dynanet.core.dynamic import Dynamic, everything, execute, forced
from dynanet.core.errors import InputError, MissingExtraError, StructureError
from dynanet.core.halt import Halt
from dynanet.core.rows import Leading, over_tensors, take_rows
from dynanet.infer.engines import Eager, Engine, OnnxRuntime, fastest, folded, onnx_runtime
from dynanet.infer.inputs import check_input

log = logging.getLogger(__name__)


class Session(nn.Module):
    """Runs a model sparsely: what a row skips is not computed.

    Maximal static parts of the model become engines, chosen part by part and batch size by batch size by measuring on
    this machine; the steps of a Halt become one engine each, and survivors are compacted between them into preallocated
    workspaces. The dynamic layers themselves are the model's own, so answers, traces and prices are those of the model:
    `record(session)` works, and a `CostModel` of the model prices its traces.

    Not for several threads at once: a session owns its workspaces.

    Args:
        model: any model with or without dynamic layers; it is copied, and stays as it is.
        example: an input batch of the size to expect, one sample or more.
        device: "cpu", or "cuda" (eager engines only).
        engines: "fastest" measures eager against ONNX Runtime; "eager" and "onnxruntime" take one of them.
        batches: the batch sizes at which engines are compared; another size takes the nearest one's engine.
        threads: of ONNX Runtime; as torch if None.
        cache: where exported graphs are kept; see `engines.cache_folder`.

    Attributes:
        model: the deployed copy.
        units: what was measured, by unit: {name: {batch: {engine: ms}}}.

    Raises:
        InputError: the example is empty, or the model cannot take it.
        StructureError: engines="onnxruntime", and a part that it cannot run.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        device: str = "cpu",
        engines: str = "fastest",
        batches: Sequence[int] = (1, 8, 64),
        threads: int | None = None,
        cache: Path | None = None,
    ):
        super().__init__()
        if engines not in ("fastest", "eager", "onnxruntime"):
            raise InputError(f"engines is {engines!r}; expected 'fastest', 'eager' or 'onnxruntime'")
        self.device = torch.device(device)
        self.example = tree_map(lambda t: t[:1].to(self.device), example)
        if not all(t.shape[0] for t in tree_flatten(self.example)[0]):
            raise InputError("a session needs an example with at least one sample; this batch is empty")
        deployed = folded(model).to(self.device)
        plan = _Plan(engines, tuple(sorted(set(batches))), threads or torch.get_num_threads(), cache, self.device)
        with torch.no_grad():
            self._empty = over_tensors(lambda t: t[:0], deployed(self.example))
            deployed = _deploy(deployed, self.example, plan)
        self.units = plan.measured
        # Not registered: the layers of a session have the names they have in the model.
        vars(self)["model"] = execute(deployed.eval(), sparse=True)

    if TYPE_CHECKING:
        model: nn.Module

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The deployed model's modules, under the names they have in the model."""
        return self.model.named_modules(*args, **kwargs)

    def engines(self) -> list["ByBatch"]:
        """The engines of every unit, in the order of the model."""
        found: list[ByBatch] = []
        for module in self.model.modules():
            if isinstance(module, StagedHalt):
                found += module.engines
            elif isinstance(module, Unit):
                found.append(module.engine)
        return found

    @torch.no_grad()
    def forward(self, x: Any) -> Any:
        """The answers for a batch of any size, 0 included.

        Raises:
            InputError: another shape or dtype than the example's, NaN or infinite values.
        """
        check_input(x, self.example)
        if self.device.type != "cpu":
            x = tree_map(lambda t: t.to(self.device), x)
        if (x if isinstance(x, Tensor) else tree_flatten(x)[0][0]).shape[0] == 0:
            return self._empty
        return self.model(x)

    def stream(self, samples: Iterable[Any], batch: int = 64) -> Iterator[Any]:
        """Answers of single samples, in order, with batches kept full: survivors of several arrivals merge.

        Early exits make batches shrink, and small batches are slow per sample. So the rows that go on past a step wait
        for each other, up to `batch`; an answer can be late by as many arrivals as that takes.

        Args:
            samples: inputs without the batch axis.
            batch: rows per step.

        Yields:
            The answer of each sample, without the batch axis.

        Raises:
            InputError: a sample that the model cannot take, or a model that is no Halt (nothing to merge).
        """
        if not isinstance(self.model, Halt):
            raise InputError(
                f"stream merges what goes on past a step; {type(self.model).__name__} has no steps: call it"
            )
        if not isinstance(batch, int) or batch < 1:
            raise InputError(f"batch is {batch}; expected how many rows run together, 1 or more")
        ready: dict[int, Any] = {}
        return self._flow(samples, batch, _Line(self.model, batch, ready), ready)

    @torch.no_grad()
    def _flow(self, samples: Iterable[Any], batch: int, line: "_Line", ready: dict[int, Any]) -> Iterator[Any]:
        arrived = yielded = 0
        group: list[Any] = []
        for sample in samples:
            group.append(sample)
            if len(group) == batch:
                line.arrive(self._batched(group, arrived), range(arrived, arrived + batch))
                arrived, group = arrived + batch, []
            while yielded in ready:
                yield ready.pop(yielded)
                yielded += 1
        if group:
            line.arrive(self._batched(group, arrived), range(arrived, arrived + len(group)))
        line.finish()
        while yielded in ready:
            yield ready.pop(yielded)
            yielded += 1

    def _batched(self, group: list[Any], first: int) -> Any:
        try:
            x = tree_map(lambda *t: torch.stack(t), *group)
            check_input(x, self.example)
        except (ValueError, TypeError, RuntimeError):  # which of them is it?
            for number, sample in enumerate(group, start=first):
                try:
                    check_input(over_tensors(lambda t: t[None], sample), self.example)
                except InputError as error:
                    raise InputError(f"sample {number} of the stream: {error}") from error
            raise
        return tree_map(lambda t: t.to(self.device), x)


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
        if isinstance(x, list):  # the state of a StagedHalt: no tree to flatten
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


class StagedHalt(Halt):
    """A Halt whose steps are engines. Its state is a flat list of tensors, with the step's score at the end.

    Attributes:
        engines: per step, by batch size.
        source: the Halt it runs; asked for its rule, so that thresholds stay where they are.
    """

    if TYPE_CHECKING:
        source: Halt

    def __init__(self, source: Halt, engines: "list[ByBatch]", states: "list[_Layout]", answers: "list[_Layout]"):
        super().__init__()
        vars(self)["source"] = source  # not registered: there is one layer here, not two
        self.engines, self._states, self._answers = engines, states, answers
        self.steps, self.limit, self._workspaces = source.steps, source.limit, Workspaces()
        self.rows = self._workspaces

    def forward(self, x: Any) -> Any:
        """Every row's answer, in memory of its own: what engines write lies in workspaces."""
        alone = (x if isinstance(x, Tensor) else _tensors(x)[0]).shape[0] == 1
        answer = self._alone(x) if alone and self.trace is None and self.force is None else super().forward(x)
        return over_tensors(torch.clone, answer)

    def _alone(self, x: Any) -> Any:
        """One row either leaves or goes on: there is nothing to gather or put back."""
        state = self.start(x)
        last = (self.steps if self.limit is None else min(self.limit, self.steps)) - 1
        for k in range(last):
            state, answer = self.step(k, state)
            if not self.source.goes_on(k, self.score(k, state, answer)).item():
                return answer
        return self.step(last, state)[1]

    def start(self, x: Any) -> list[Tensor]:
        """The tensors of the source's first state."""
        self._workspaces.begin()
        return _tensors(self.source.start(x))

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

    def goes_on(self, k: int, score: Tensor) -> Tensor:
        """The source's rule."""
        return self.source.goes_on(k, score)


class Unit(nn.Module):
    """A static part of a model, run by an engine in the model's place."""

    if TYPE_CHECKING:
        module: nn.Module

    def __init__(self, module: nn.Module, engine: "ByBatch", inputs: Sequence[Tensor], structure: Any):
        super().__init__()
        self.engine, self._structure = engine, structure
        self._takes = [(t.shape[1:], t.dtype) for t in inputs]
        vars(self)["module"] = module  # not registered: its weights are in the engine

    def forward(self, *args: Any) -> Any:
        """As the part it stands for; that itself runs what comes in another size."""
        inputs = _tensors(args)
        if [(t.shape[1:], t.dtype) for t in inputs] != self._takes:
            return self.module(*args)
        if inputs[0].shape[0] == 0:
            return self.engine.empty(self._structure)
        return tree_unflatten(self.engine(inputs), self._structure)


class ByBatch:
    """A unit's engines: the one that was fastest at the nearest batch size runs.

    Attributes:
        engines: by batch size.
        listener: is shown the inputs of every call, for measuring.
    """

    def __init__(self, engines: dict[int, Engine], outputs: Sequence[Tensor]):
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


_CHUNKS = (4, 16)
_MOST_ROWS, _MOST_BYTES = 256, 32 * 2**20  # beyond these a row costs what it costs at them


class _Plan:
    """Which engines to try for a unit, and what they measured."""

    def __init__(self, engines: str, batches: tuple[int, ...], threads: int, cache: Path | None, device: torch.device):
        usable = device.type == "cpu" and engines != "eager" and onnx_runtime() is not None
        self.eager = engines != "onnxruntime" or not usable
        self.onnx, self.batches, self.threads, self.cache = usable, batches, threads, cache
        self.measured: dict[str, dict[int, dict[str, float]]] = {}

    def engine(self, name: str, unit: nn.Module, inputs: Sequence[Tensor], *, workspaces: bool) -> ByBatch:
        """Engines for a unit, from the rows that one sample sends through it."""
        per_sample, few = inputs[0].shape[0], [t[:2] for t in inputs]
        few = [t.repeat(2, *[1] * (t.dim() - 1)) if t.shape[0] == 1 else t for t in few]
        eager, outputs = Eager(unit), [t[:0] for t in unit(*few)]
        if not self.onnx:
            return ByBatch({1: eager}, outputs)
        try:
            onnx = OnnxRuntime(unit, few, threads=self.threads, workspaces=workspaces, cache=self.cache)
        except (MissingExtraError, StructureError) as error:
            if not self.eager:
                raise
            log.warning("%s runs eager: %s", name or "the model", error)
            self.onnx = not isinstance(error, MissingExtraError)
            return ByBatch({1: eager}, outputs)
        best, self.measured[name] = {}, {}
        row_bytes = sum(t[:1].numel() * t.element_size() for t in few)
        for batch in self.batches:
            rows = max(1, min(batch * per_sample, _MOST_ROWS, _MOST_BYTES // row_bytes))
            engines = [*([eager] if self.eager else []), onnx, *(onnx.chunked(n) for n in _CHUNKS if n < rows)]
            many = [t[:1].repeat(rows, *[1] * (t.dim() - 1)) for t in few]
            best[rows], ms = fastest(engines, many, threads=self.threads)
            self.measured[name][batch] = {engine: time * batch * per_sample / rows for engine, time in ms.items()}
        return ByBatch(best, outputs)


class _Step(nn.Module):
    """Step k of a Halt as a function of flat tensors: (state..., answer..., score); the last step answers only.

    What is no tensor in the state (a size, None) stays as it was when the step was made.
    """

    def __init__(self, halt: Halt, k: int, state: "_Layout"):
        super().__init__()
        self.halt, self.k, self._state = halt, k, state

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        state, answer = self.halt.step(self.k, self._state.filled(flat))
        if self.k + 1 == self.halt.steps:
            return tuple(_tensors(answer))
        return (*_tensors(state), *_tensors(answer), self.halt.score(self.k, state, answer))


class _Layout:
    """A pytree without its tensors; what else it holds stays in its place.

    Attributes:
        tensors: how many there are.
    """

    def __init__(self, tree: Any):
        leaves, self._structure = tree_flatten(tree)
        self._others = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        self.tensors = len(leaves) - len(self._others)

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """The pytree with these tensors."""
        leaves: list[Any] = list(tensors)
        for i, other in self._others.items():
            leaves.insert(i, other)
        return tree_unflatten(leaves, self._structure)


class _Part(nn.Module):
    """A static submodule as a function of flat tensors."""

    def __init__(self, module: nn.Module, structure: Any):
        super().__init__()
        self.module, self._structure = module, structure

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(_tensors(self.module(*tree_unflatten(list(flat), self._structure))))


def _deploy(model: nn.Module, example: Any, plan: _Plan) -> nn.Module:
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


def _staged(name: str, halt: Halt, x: Any, plan: _Plan) -> StagedHalt:
    engines, states, answers, state = [], [], [], halt.start(x)
    for k in range(halt.steps):
        unit = _Step(halt, k, _Layout(state))
        engines.append(plan.engine(f"{name}.step{k}".strip("."), unit, _tensors(state), workspaces=True))
        state, answer = halt.step(k, state)
        states.append(_Layout(state if k + 1 < halt.steps else ()))
        answers.append(_Layout(answer))
    return StagedHalt(halt, engines, states, answers)


def _unit(name: str, module: nn.Module, args: tuple[Any, ...], plan: _Plan) -> Unit | None:
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
    """The largest submodules with nothing dynamic inside; containers that are never called are looked into."""
    for name, child in model.named_children():
        if _dynamic_inside(child) or isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _static_parts(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield f"{prefix}{name}", child


def _dynamic_inside(module: nn.Module, *, itself: bool = True) -> bool:
    return any(isinstance(m, Dynamic) and (itself or m is not module) for m in module.modules())


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class _Line:
    """Rows on their way through a Halt, waiting at each step until a batch is full."""

    def __init__(self, halt: Halt, batch: int, ready: dict[int, Any]):
        self.halt, self.batch, self.ready = halt, batch, ready
        self.last = (halt.steps if halt.limit is None else min(halt.limit, halt.steps)) - 1
        self.waiting: list[list[tuple[Any, list[int]]]] = [[] for _ in range(halt.steps)]

    def arrive(self, x: Any, numbers: Iterable[int]) -> None:
        """New rows; steps whose batch is full run, the deepest first."""
        self.waiting[0].append((self.halt.start(x), list(numbers)))
        self._drain(full_only=True)

    def finish(self) -> None:
        """No more rows will come."""
        self._drain(full_only=False)

    def _drain(self, *, full_only: bool) -> None:
        for k in range(self.last + 1):
            while (rows := sum(len(numbers) for _, numbers in self.waiting[k])) >= self.batch or (
                rows and not full_only
            ):
                self._run(k)

    def _run(self, k: int) -> None:
        state, numbers = self._merged(k)
        state, answer = self.halt.step(k, state)
        stays: list[int] = []
        if k < self.last:
            keep = self.halt.goes_on(k, self.halt.score(k, state, answer))[..., 0]
            index = keep.nonzero().squeeze(1)
            stays = index.tolist()
            if stays:
                kept = over_tensors(lambda t: take_rows(t, index), state)
                self.waiting[k + 1].append((kept, [numbers[i] for i in stays]))
        leaves, structure = tree_flatten(answer)
        going = set(stays)
        for i, number in enumerate(numbers):
            if i not in going:
                answers = [t[i].clone() if isinstance(t, Tensor) else t for t in leaves]
                self.ready[number] = tree_unflatten(answers, structure)

    def _merged(self, k: int) -> tuple[Any, list[int]]:
        """Up to a batch of the rows that wait at step k."""
        groups, self.waiting[k] = self.waiting[k], []
        numbers = [n for _, ns in groups for n in ns]
        state = groups[0][0] if len(groups) == 1 else tree_map(_joined, *[s for s, _ in groups])
        if len(numbers) > self.batch:
            rest = over_tensors(lambda t: t[self.batch :], state)
            self.waiting[k] = [(rest, numbers[self.batch :])]
            state, numbers = over_tensors(lambda t: t[: self.batch], state), numbers[: self.batch]
        return state, numbers


def _joined(*parts: Any) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
