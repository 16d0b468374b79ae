"""A session runs a model sparsely: engines for its static parts, compaction where it decides."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from dynanet.core.dynamic import execute, layers
from dynanet.core.errors import REFUSALS, InputError, cannot_take
from dynanet.core.halt import Halt
from dynanet.core.rows import over_tensors
from dynanet.core.serving import FrameByFrame
from dynanet.session.compiled import BatchOnePath, CompiledHalt, CompiledPart, compiled, uncompiled
from dynanet.session.engines import OnnxRuntime
from dynanet.session.inputs import check_example, check_input
from dynanet.session.plan import folded, plan_units
from dynanet.session.selector import EnginesByBatch, EngineSelector
from dynanet.session.stream import EndOfSequence, SequenceAnswer, SequenceFrame, StepQueue, StreamingSession

log = logging.getLogger(__name__)


class Session(nn.Module):
    """Runs a model sparsely: what a row skips is not computed.

    The largest static parts of the model become engines, each chosen by measuring on this machine at several batch
    sizes. Every step of a Halt becomes one engine, and remaining rows are compacted between steps into preallocated
    workspaces. The dynamic layers are the model's own, so answers, traces and prices are those of the model:
    `record(session)` works, and a `CostModel` of the model prices its traces.

    Threads may call one session at the same time: it owns its workspaces, so calls wait for each other. To record or
    force its decisions, let no other thread call it. A session that is pickled or copied is built again from its model
    where it arrives, and measured there.

    Args:
        model: any model with or without dynamic layers; it is copied, and not changed.
        example: an input batch of the size to expect, one sample or more.
        device: "cpu", or "cuda" (eager engines only).
        engines: "fastest" compares eager and ONNX Runtime; "eager" and "onnxruntime" use one of them.
        batches: the batch sizes at which engines are compared; another size uses the nearest one's engine.
        threads: of ONNX Runtime; as torch if None.
        cache: folder of exported graphs; see `engines.cache_folder`.

    Attributes:
        model: the deployed copy.
        units: measured milliseconds, by unit: {name: {batch: {engine: ms}}}.

    Raises:
        InputError: the example is empty, the model cannot take it, or the device is missing.
        StructureError: a part that ONNX Runtime cannot run, with engines="onnxruntime".
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
    ) -> None:
        super().__init__()
        if engines not in ("fastest", "eager", "onnxruntime"):
            raise InputError(f"engines is {engines!r}; expected 'fastest', 'eager' or 'onnxruntime'")
        self._options = {"device": device, "engines": engines, "batches": batches, "threads": threads, "cache": cache}
        self._lock = RLock()
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device is {device!r}, but torch {torch.__version__} finds none; use 'cpu'")
        check_example(example)
        self.example = tree_map(lambda t: t[:1].to(self.device), example)
        if not all(t.shape[0] for t in tree_flatten(self.example)[0]):
            raise InputError("a session needs an example with at least one sample; this batch is empty")
        if not batches or min(batches) < 1:
            raise InputError(f"batches is {tuple(batches)}; expected batch sizes, 1 or more each")
        source = folded(model).to(self.device)
        selector = EngineSelector(
            engines, tuple(sorted(set(batches))), threads or torch.get_num_threads(), cache, self.device
        )
        with torch.no_grad():
            try:
                self._empty = over_tensors(lambda t: t[:0], source(self.example))
            except REFUSALS as error:
                raise cannot_take(error, rows=1) from error
            plan = plan_units(source, self.example, one_row=selector.onnx)
            single = [selector.engines(unit) for unit in plan.one_row]
            self._one_row = BatchOnePath(source, single) if isinstance(source, Halt) and single else None
            deployed = compiled(source, plan, selector)
        self.units = selector.measured
        # Not registered: the layers of a session have the names they have in the model.
        vars(self)["model"] = execute(deployed.eval(), sparse=True)
        used = [engine for each in self.engines() for engine in each.engines.values()]
        self._only_gathers = bool(used) and all(isinstance(engine, OnnxRuntime) for engine in used)

    if TYPE_CHECKING:
        model: nn.Module

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over the deployed model's modules, under the names they have in the model."""
        return self.model.named_modules(*args, **kwargs)

    def engines(self) -> list[EnginesByBatch]:
        """Return the engines of every unit, in the order of the model."""
        found: list[EnginesByBatch] = [] if self._one_row is None else list(self._one_row.engines)
        for module in self.model.modules():
            if isinstance(module, CompiledHalt):
                found += module.engines
            elif isinstance(module, CompiledPart):
                found.append(module.engine)
        return found

    @torch.no_grad()
    def forward(self, x: Any) -> Any:
        """Compute the answers for a batch of any size, 0 included.

        Raises:
            InputError: another shape or dtype than the example's, NaN or infinite values.
        """
        check_input(x, self.example)
        if self.device.type != "cpu":
            x = tree_map(lambda t: t.to(self.device), x)
        if (x if isinstance(x, Tensor) else tree_flatten(x)[0][0]).shape[0] == 0:
            return self._empty
        with self._lock, self._torch_threads():
            if self._one_row is not None and self._one_row.serves(x):
                return self._one_row(x)
            return self.model(x)

    def __reduce__(self) -> tuple[Callable[..., "Session"], tuple[Any, ...]]:
        """Take the model, the example and the options; engines cannot be taken along, and are built again.

        Raises:
            InputError: the session is being recorded or forced.
        """
        if any(layer.trace is not None or layer.force is not None for layer in layers(self.model).values()):
            raise InputError(
                "this session is being recorded or forced, which no copy could be; copy it outside of the block"
            )
        with self._lock:
            return _rebuilt, (uncompiled(self.model), self.example, self._options)

    def stream(self, samples: Iterable[Any], batch: int = 64) -> Iterator[Any]:
        """Answer single samples, or frames of sequences, as they arrive, with batches kept full.

        Samples are answered in their order. Early exits make batches shrink, and small batches are slow per sample; so
        rows that continue past a step wait for each other, up to `batch`. Answers are delayed until such a batch is
        full.

        Frames (`SequenceFrame`) of any number of sequences, in any order, are answered as soon as the model's rule
        allows (`SequenceAnswer`), at the latest at the sequence's end (`EndOfSequence`, or the end of the stream). See
        `sequences` for a form that is called, and that can continue after an invalid frame.

        Args:
            samples: inputs without the batch axis; or `SequenceFrame` and `EndOfSequence`, for a model that reads frame
                by frame.
            batch: rows per step.

        Yields:
            The answer of each sample, without the batch axis; or a `SequenceAnswer` per sequence.

        Raises:
            InputError: a sample or frame that the model cannot take, or a model that is not a Halt.
        """
        if not isinstance(self.model, Halt):
            raise InputError(
                f"stream merges rows that continue past a step; {type(self.model).__name__} has no steps: call it"
            )
        _check_batch(batch)
        return self._stream(self.model, iter(samples), batch)

    def sequences(self, batch: int = 64) -> StreamingSession:
        """Serve sequences whose frames arrive one by one, as `stream` does, by calls.

        Args:
            batch: number of frames that run together at most.

        Raises:
            InputError: a model that does not read frame by frame.
        """
        if not isinstance(self.model, FrameByFrame):
            raise InputError(
                f"frames are for models that read frame by frame, as EarlyStop does; {type(self.model).__name__} does "
                f"not: give it whole samples"
            )
        _check_batch(batch)
        return StreamingSession(self.model, self.example, batch, self.device, self._torch_threads, self._lock)

    def _stream(self, halt: Halt, samples: Iterator[Any], batch: int) -> Iterator[Any]:
        for first in samples:
            samples = chain([first], samples)
            if isinstance(first, SequenceFrame | EndOfSequence):
                yield from self._frames(samples, self.sequences(batch))
            elif batch == 1:  # no row has to wait
                for number, sample in enumerate(samples):
                    yield over_tensors(lambda t: t[0], self(self._batched([sample], number)))
            else:
                ready: dict[int, Any] = {}
                yield from self._flow(samples, batch, StepQueue(halt, batch, ready), ready)

    def _frames(self, arrivals: Iterable[Any], sequences: StreamingSession) -> Iterator[SequenceAnswer]:
        for number, arrived in enumerate(arrivals):
            if isinstance(arrived, SequenceFrame):
                yield from sequences.read(*arrived)
            elif isinstance(arrived, EndOfSequence):
                yield from sequences.end(arrived.sequence)
            else:
                raise InputError(
                    f"item {number} of the stream is {type(arrived).__name__}; expected "
                    f"SequenceFrame or EndOfSequence, as before"
                )
        yield from sequences.end_all()

    @torch.no_grad()
    def _flow(self, samples: Iterable[Any], batch: int, queue: StepQueue, ready: dict[int, Any]) -> Iterator[Any]:
        arrived = 0
        yielded = 0
        group: list[Any] = []
        for sample in samples:
            group.append(sample)
            if len(group) == batch:
                with self._lock, self._torch_threads():
                    queue.arrive(self._batched(group, arrived), range(arrived, arrived + batch))
                arrived += batch
                group = []
            while yielded in ready:
                yield ready.pop(yielded)
                yielded += 1
        with self._lock, self._torch_threads():
            if group:
                queue.arrive(self._batched(group, arrived), range(arrived, arrived + len(group)))
            queue.finish()
        while yielded in ready:
            yield ready.pop(yielded)
            yielded += 1

    @contextmanager
    def _torch_threads(self) -> Iterator[None]:
        """Give torch one thread where it only moves rows: more would spin on the cores that the runtime needs."""
        threads = torch.get_num_threads()
        if threads == 1 or not self._only_gathers:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _batched(self, group: list[Any], first: int) -> Any:
        try:
            x = tree_map(lambda *t: torch.stack(t), *group)
            check_input(x, self.example)
        except (ValueError, TypeError, RuntimeError):  # find the sample at fault
            for number, sample in enumerate(group, start=first):
                try:
                    check_input(over_tensors(lambda t: t[None], sample), self.example)
                except InputError as error:
                    raise InputError(f"sample {number} of the stream: {error}") from error
            raise
        return tree_map(lambda t: t.to(self.device), x)


def _rebuilt(model: nn.Module, example: Any, options: dict[str, Any]) -> Session:
    return Session(model, example, **options)


def _check_batch(batch: int) -> None:
    if not isinstance(batch, int) or batch < 1:
        raise InputError(f"batch is {batch!r}; expected a number of rows, at least 1")
