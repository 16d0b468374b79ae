"""Selection: which engine runs a unit fastest on this machine, at several batch sizes."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from dynanet.core.errors import MissingExtraError, StructureError
from dynanet.session.engines import Eager, Engine, OnnxRuntime, onnx_runtime
from dynanet.session.plan import StaticUnit

log = logging.getLogger(__name__)

_CHUNKS = (4, 16)
# Beyond these sizes the cost per row stays the same.
_MOST_ROWS = 256
_MOST_BYTES = 32 * 2**20


class EnginesByBatch:
    """A unit's engines: the one that was fastest at the nearest batch size runs.

    Attributes:
        engines: by number of rows.
        listener: called with the inputs of every call, for measuring.
    """

    def __init__(self, engines: dict[int, Engine], outputs: Sequence[Tensor]) -> None:
        self.engines = engines
        self.listener: Callable[[Sequence[Tensor]], None] | None = None
        self._sizes = sorted(engines)
        self._empty = list(outputs)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compute the unit's outputs."""
        if self.listener is not None:
            self.listener(inputs)
        rows = inputs[0].shape[0]
        nearest = self._sizes[0]
        for size in self._sizes[1:]:
            if rows * rows >= nearest * size:  # the geometric middle between two sizes
                nearest = size
        return self.engines[nearest](inputs)

    def empty(self, structure: Any) -> Any:
        """Return the answer for a batch without rows."""
        return tree_unflatten(self._empty, structure)


class EngineSelector:
    """Builds the engines that may run a unit, and keeps the fastest at each batch size.

    Args:
        engines: "fastest", "eager" or "onnxruntime".
        batches: batch sizes at which engines are compared, ascending.
        threads: of ONNX Runtime.
        cache: folder of exported graphs.
        device: of the units.

    Attributes:
        onnx: ONNX Runtime is among the engines.
        measured: milliseconds by unit, batch size and engine.
    """

    def __init__(
        self, engines: str, batches: tuple[int, ...], threads: int, cache: Path | None, device: torch.device
    ) -> None:
        self.onnx = device.type == "cpu" and engines != "eager" and onnx_runtime() is not None
        self.measured: dict[str, dict[int, dict[str, float]]] = {}
        self._eager = engines != "onnxruntime" or not self.onnx
        self._batches = batches
        self._threads = threads
        self._cache = cache

    def engines(self, unit: StaticUnit) -> EnginesByBatch:
        """Select the engines of a unit.

        Raises:
            StructureError: ONNX Runtime cannot run the unit, and is the only engine allowed.
        """
        few = [_repeated(t, 2) if t.shape[0] == 1 else t[:2] for t in unit.inputs]
        eager = Eager(unit.function)
        outputs = [t[:0] for t in unit.function(*few)]
        onnx = self._onnx_engine(unit, few) if self.onnx else None
        if onnx is None:
            return EnginesByBatch({1: eager}, outputs)
        per_sample = unit.inputs[0].shape[0]
        row_bytes = sum(t[:1].numel() * t.element_size() for t in few)
        best: dict[int, Engine] = {}
        measured = self.measured[unit.name] = {}
        for batch in self._batches if unit.divisible else (1,):
            rows = max(1, min(batch * per_sample, _MOST_ROWS, _MOST_BYTES // row_bytes))
            chunked = [onnx.chunked(n) for n in _CHUNKS if unit.divisible and n < rows]
            candidates = [*([eager] if self._eager else []), onnx, *chunked]
            many = [_repeated(t[:1], rows) for t in few]
            best[rows], ms = fastest(candidates, many, threads=self._threads)
            measured[batch] = {engine: time * batch * per_sample / rows for engine, time in ms.items()}
        return EnginesByBatch(best, outputs)

    def _onnx_engine(self, unit: StaticUnit, few: Sequence[Tensor]) -> OnnxRuntime | None:
        try:
            return OnnxRuntime(unit.function, few, threads=self._threads, workspaces=unit.workspaces, cache=self._cache)
        except (MissingExtraError, StructureError) as error:
            if not self._eager:
                raise
            log.warning("%s runs eager: %s", unit.name or "the model", error)
            self.onnx = not isinstance(error, MissingExtraError)
            return None


def fastest(
    engines: Sequence[Engine], inputs: Sequence[Tensor], *, threads: int, seconds: float = 0.1
) -> tuple[Engine, dict[str, float]]:
    """Measure engines on these rows.

    Runs are interleaved, and the minimum of at least three is taken: other programs only ever add time, and a choice
    made once at load time should not depend on them. On one thread it is processor time, which they do not affect.

    Args:
        engines: to compare.
        inputs: of each call.
        threads: of the engines.
        seconds: to spend at most, once there are three runs of each; 50 runs are enough in any case.

    Returns:
        The fastest engine, and the milliseconds of every engine.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    ms = {engine.name: float("inf") for engine in engines}
    started = time.perf_counter()
    rounds = 0
    while rounds < 4 or (rounds < 50 and time.perf_counter() - started < seconds):
        for engine in engines:
            start = clock()
            engine(inputs)
            if rounds:  # the first round warms up
                ms[engine.name] = min(ms[engine.name], 1e3 * (clock() - start))
        rounds += 1
    return min(engines, key=lambda engine: ms[engine.name]), ms


def _repeated(t: Tensor, times: int) -> Tensor:
    """Repeat rows in t's memory format: an engine that wants another one pays for the conversion."""
    last = t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return t.repeat(times, *[1] * (t.dim() - 1)).contiguous(memory_format=layout)
