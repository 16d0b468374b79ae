"""A Session runs a model for real: engines for what is static, compaction for what is decided."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from dynanet.core.dynamic import execute
from dynanet.core.errors import InputError
from dynanet.core.halt import Halt
from dynanet.core.rows import over_tensors
from dynanet.core.serving import FrameByFrame
from dynanet.session.compiled import BatchOnePath, CompiledHalt, CompiledPart, compiled
from dynanet.session.engines import OnnxRuntime
from dynanet.session.inputs import check_input
from dynanet.session.plan import folded, plan_units
from dynanet.session.selector import EnginesByBatch, EngineSelector
from dynanet.session.stream import EndOfSequence, SequenceAnswer, SequenceFrame, StepQueue, StreamingSession

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
        InputError: the example is empty, the model cannot take it, or the device is not there.
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
    ) -> None:
        super().__init__()
        if engines not in ("fastest", "eager", "onnxruntime"):
            raise InputError(f"engines is {engines!r}; expected 'fastest', 'eager' or 'onnxruntime'")
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device is {device!r}, but torch {torch.__version__} sees none here; take 'cpu'")
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
            except (RuntimeError, TypeError, IndexError) as error:
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"the model cannot take this example ({reason}); give one that it takes") from error
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
        """The deployed model's modules, under the names they have in the model."""
        return self.model.named_modules(*args, **kwargs)

    def engines(self) -> list[EnginesByBatch]:
        """The engines of every unit, in the order of the model."""
        found: list[EnginesByBatch] = [] if self._one_row is None else list(self._one_row.engines)
        for module in self.model.modules():
            if isinstance(module, CompiledHalt):
                found += module.engines
            elif isinstance(module, CompiledPart):
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
        with self._torch_threads():
            if self._one_row is not None and self._one_row.serves(x):
                return self._one_row(x)
            return self.model(x)

    def stream(self, samples: Iterable[Any], batch: int = 64) -> Iterator[Any]:
        """Answers to what arrives bit by bit, with batches kept full: single samples, or frames of sequences.

        Samples are answered in their order. Early exits make batches shrink, and small batches are slow per sample; so
        the rows that go on past a step wait for each other, up to `batch`. An answer can be late by as many arrivals as
        that takes.

        Frames (`SequenceFrame`) of any number of sequences, in any order, are answered as soon as the model's rule
        allows (`SequenceAnswer`), at the latest at the sequence's end (`EndOfSequence`, or the end of the stream); see
        `StreamingSession`, which serves them where they come by calls, and goes on after a frame that is refused.

        Args:
            samples: inputs without the batch axis; or `SequenceFrame` and `EndOfSequence`, for a model that reads frame
                by frame.
            batch: rows per step.

        Yields:
            The answer of each sample, without the batch axis; or an `SequenceAnswer` per sequence.

        Raises:
            InputError: a sample or frame that the model cannot take, or a model that is no Halt (nothing to merge).
        """
        if not isinstance(self.model, Halt):
            raise InputError(
                f"stream merges what goes on past a step; {type(self.model).__name__} has no steps: call it"
            )
        _check_batch(batch)
        return self._stream(self.model, iter(samples), batch)

    def sequences(self, batch: int = 64) -> StreamingSession:
        """Serves sequences whose frames arrive one by one, by calls: what `stream` does with `SequenceFrame` and
        `EndOfSequence`.

        Args:
            batch: frames that run together at most.

        Raises:
            InputError: a model that does not read frame by frame.
        """
        if not isinstance(self.model, FrameByFrame):
            raise InputError(
                f"frames are for models that read frame by frame, as EarlyStop does; {type(self.model).__name__} does "
                f"not: give it whole samples"
            )
        _check_batch(batch)
        return StreamingSession(self.model, self.example, batch, self.device, self._torch_threads)

    def _stream(self, halt: Halt, samples: Iterator[Any], batch: int) -> Iterator[Any]:
        for first in samples:
            samples = chain([first], samples)
            if isinstance(first, SequenceFrame | EndOfSequence):
                yield from self._frames(samples, self.sequences(batch))
            elif batch == 1:  # nothing to wait for
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
    def _flow(self, samples: Iterable[Any], batch: int, line: "StepQueue", ready: dict[int, Any]) -> Iterator[Any]:
        arrived = yielded = 0
        group: list[Any] = []
        for sample in samples:
            group.append(sample)
            if len(group) == batch:
                with self._torch_threads():
                    line.arrive(self._batched(group, arrived), range(arrived, arrived + batch))
                arrived, group = arrived + batch, []
            while yielded in ready:
                yield ready.pop(yielded)
                yielded += 1
        with self._torch_threads():
            if group:
                line.arrive(self._batched(group, arrived), range(arrived, arrived + len(group)))
            line.finish()
        while yielded in ready:
            yield ready.pop(yielded)
            yielded += 1

    @contextmanager
    def _torch_threads(self) -> Iterator[None]:
        """One, where torch does nothing but move rows: more would wait, spinning, on the cores of the runtime."""
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
        except (ValueError, TypeError, RuntimeError):  # which of them is it?
            for number, sample in enumerate(group, start=first):
                try:
                    check_input(over_tensors(lambda t: t[None], sample), self.example)
                except InputError as error:
                    raise InputError(f"sample {number} of the stream: {error}") from error
            raise
        return tree_map(lambda t: t.to(self.device), x)


def _check_batch(batch: int) -> None:
    if not isinstance(batch, int) or batch < 1:
        raise InputError(f"batch is {batch}; expected how many rows run together, 1 or more")
