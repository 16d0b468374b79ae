"""Engines run one static unit: eager torch, or an ONNX Runtime graph with a dynamic batch. Flat tensors in and out.

A unit here is a function of tensors whose first axis is the rows, with nothing dynamic inside. Which engine is faster
depends on the unit, the batch and the machine, so a session measures (`fastest`) and does not guess.
"""

import copy
import functools
import hashlib
import io
import logging
import math
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dynanet.core.errors import MissingExtraError, StructureError, require
from dynanet.core.files import write_atomically

log = logging.getLogger(__name__)


class Engine(ABC):
    """Runs a unit.

    Attributes:
        name: what reports call it.
    """

    name: str

    @abstractmethod
    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The unit's outputs for these rows; never called without rows. With workspaces on, an output stays valid
        until the next call only.
        """


class Eager(Engine):
    """Torch itself: the fallback, and the engine on GPUs."""

    name = "eager"

    def __init__(self, unit: nn.Module) -> None:
        self.unit = unit

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The unit's outputs."""
        return list(self.unit(*inputs))


class OnnxRuntime(Engine):
    """One graph for all batch sizes. Exported once and kept in the cache, by a hash of what it computes.

    Args:
        unit: maps flat tensors to a tuple of tensors, on the CPU.
        inputs: an example, two rows or more.
        threads: of the runtime.
        workspaces: write into buffers that the next call writes again. Fresh large allocations cost more in page
            faults than the copy they hold; but then a result must be used before the next call.
        cache: folder of exported graphs; `cache_folder()` if None.

    Raises:
        MissingExtraError: onnxruntime (or, for a graph that is not in the cache, onnx and onnxscript) is missing.
        StructureError: the unit cannot become such a graph, or the graph answers something else.
    """

    name = "onnxruntime"

    def __init__(
        self, unit: nn.Module, inputs: Sequence[Tensor], *, threads: int, workspaces: bool, cache: Path | None = None
    ) -> None:
        require("onnxruntime", "onnx")
        with torch.no_grad():
            outputs = unit(*inputs)
        self._threads, self._workspaces, self._chunk = threads, workspaces, 0
        try:
            program, name = _program(unit, tuple(inputs))
            path = (cache if cache is not None else cache_folder()) / name
            try:
                self._open(path.read_bytes(), inputs, outputs)
            except Exception:  # not kept yet, damaged, or of another version of the runtime
                self._open(_exported(program, path), inputs, outputs)
        except MissingExtraError:
            raise
        except Exception as error:  # exporter and runtime have dozens of kinds for what they cannot do
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise StructureError(f"a part that ONNX Runtime cannot run ({reason}); use eager engines") from error

    def _open(self, graph: bytes, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        runtime = require("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        # Threads that spin while they wait take the cores from torch's, and torch's from them: 4 times slower on two.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4
        self._runtime = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._inputs = [node.name for node in self._runtime.get_inputs()]
        self._outputs = [
            (node.name, tuple(t.shape[1:]), t.dtype)
            for node, t in zip(self._runtime.get_outputs(), outputs, strict=True)
        ]
        # The exporter drops inputs that the unit does not read.
        self._used = [int(name.removeprefix("input_")) for name in self._inputs]
        self._output_bytes = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self._outputs)
        self._row_bytes = [inputs[which][:1].numel() * inputs[which].element_size() for which in self._used]
        self._buffers: list[Tensor] = []
        self._plans: dict[int, _Plan] = {}
        for ours, theirs in zip(self(inputs), outputs, strict=True):
            if theirs.is_floating_point() and not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3, equal_nan=True):
                raise StructureError("its graph answers something else than the part itself")

    def chunked(self, rows: int) -> "OnnxRuntime":
        """The same graph, fed so many rows at a time: activations of a small chunk stay in the cache."""
        other = copy.copy(self)
        other.name, other._chunk, other._buffers, other._plans = f"{self.name}, {rows} at a time", rows, [], {}
        return other

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The unit's outputs, bound without a copy."""
        rows = inputs[0].shape[0]
        inputs = [t if t.is_contiguous() else t.contiguous() for t in inputs]
        plan = self._plans.get(rows) or self._plan(rows)
        for first, n, binding, bound in plan.runs:
            for i, (name, which) in enumerate(zip(self._inputs, self._used, strict=True)):
                t = inputs[which]
                address = t.data_ptr() + first * self._row_bytes[i]
                if bound[i] != address:  # with workspaces most addresses are those of the last such call
                    binding.bind_input(name, "cpu", 0, _NUMPY[t.dtype], (n, *t.shape[1:]), address)
                    bound[i] = address
            self._runtime.run_with_iobinding(binding)
        return plan.outputs if self._workspaces or not plan.again else [t.clone() for t in plan.outputs]

    def _plan(self, rows: int) -> "_Plan":
        """Where so many rows go: outputs bound once, kept for the next call if they lie in workspaces. Small outputs
        always do, and are copied: that is quicker than to bind others.
        """
        again = self._workspaces or rows * self._output_bytes <= _SMALL
        if not again:
            outputs = [torch.empty(rows, *shape, dtype=dtype) for _, shape, dtype in self._outputs]
        else:
            if not self._buffers or self._buffers[0].shape[0] < rows:
                self._buffers = [torch.empty(rows, *shape, dtype=dtype) for _, shape, dtype in self._outputs]
                self._plans.clear()
            outputs = [buffer[:rows] for buffer in self._buffers]
        runs, step = [], self._chunk or rows
        for first in range(0, rows, step):
            n, binding = min(step, rows - first), self._runtime.io_binding()
            for (name, shape, dtype), out in zip(self._outputs, outputs, strict=True):
                address = out.data_ptr() + first * out.stride(0) * out.element_size()
                binding.bind_output(name, "cpu", 0, _NUMPY[dtype], (n, *shape), address)
            runs.append((first, n, binding, [0] * len(self._inputs)))
        plan = _Plan(outputs, runs, again)
        if again:
            self._plans[rows] = plan
        return plan


class _Plan(NamedTuple):
    """The outputs of a call, its runs: (first row, rows, binding, addresses of the bound inputs), and whether it serves
    the next call too.
    """

    outputs: list[Tensor]
    runs: list[tuple[int, int, Any, list[int]]]
    again: bool


def fastest(
    engines: Sequence[Engine], inputs: Sequence[Tensor], *, threads: int, seconds: float = 0.1
) -> tuple[Engine, dict[str, float]]:
    """The quickest engine for these rows, and every engine's milliseconds.

    Interleaved, each the minimum of at least three runs: other programs only ever add time, and a choice made once at
    load time should not hang on them. On one thread it is processor time, which they do not even touch.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    ms = {engine.name: float("inf") for engine in engines}
    started, rounds = time.perf_counter(), 0
    while rounds < 4 or (rounds < 50 and time.perf_counter() - started < seconds):
        for engine in engines:
            start = clock()
            engine(inputs)
            if rounds:  # the first round warms up
                ms[engine.name] = min(ms[engine.name], 1e3 * (clock() - start))
        rounds += 1
    return min(engines, key=lambda engine: ms[engine.name]), ms


def folded(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose batch norms are folded into the convolutions before them (in a Sequential)."""
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        if not isinstance(parent, nn.Sequential):
            continue
        for i in range(len(parent) - 1):
            conv, norm = parent[i], parent[i + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
                parent[i], parent[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return model.requires_grad_(False)


@functools.cache
def onnx_runtime() -> ModuleType | None:
    """The onnxruntime module; None, said once, where it is not installed."""
    try:
        return require("onnxruntime", "onnx")
    except MissingExtraError as error:
        log.warning("running eager: %s", error)
        return None


def cache_folder() -> Path:
    """Where exported graphs are kept: $DYNANET_CACHE, or dynanet/engines in the user's cache folder."""
    home = (
        os.environ.get("DYNANET_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynanet"
    )
    return Path(home) / "engines"


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64, torch.bool: np.bool_}


def _program(unit: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[torch.export.ExportedProgram, str]:
    """The unit as a program, and the name of its graph in the cache: a hash of all that it computes with."""
    batch = torch.export.Dim("batch")
    with _quiet("torch.fx", logging.CRITICAL), redirect_stderr(io.StringIO()):  # what it cannot do, it prints at length
        program = torch.export.export(
            _Positional(unit, len(inputs)), inputs, dynamic_shapes=(tuple({0: batch} for _ in inputs),)
        )
    digest = hashlib.sha256(f"{torch.__version__}|{[(t.dtype, t.shape[1:]) for t in inputs]}".encode())
    digest.update(str(program.graph).encode())
    # Only what the graph reads: thresholds, and the weights of other steps, may change without a new graph.
    read = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    values = {**program.state_dict, **program.constants}
    for spec in program.graph_signature.input_specs:
        tensor = values.get(spec.target) if spec.arg.name in read else None
        if isinstance(tensor, Tensor):
            digest.update(f"{spec.target}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return program, f"{digest.hexdigest()}.onnx"


def _exported(program: torch.export.ExportedProgram, path: Path) -> bytes:
    """The program's graph; kept at the path, if one can write there."""
    require("onnxscript", "onnx")
    inputs = len(program.graph_signature.user_inputs)
    with warnings.catch_warnings(), _quiet("torch.onnx", logging.ERROR):  # it warns of torchvision's absence
        warnings.simplefilter("ignore")  # the exporter's own deprecations, not ours
        exported = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[f"input_{i}" for i in range(inputs)]
        )
    assert exported is not None
    graph = exported.model_proto.SerializeToString()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(graph))
    except OSError as error:
        log.warning("exported graphs cannot be kept in %s (%s); set DYNANET_CACHE", path.parent, error.strerror)
    return graph


@contextmanager
def _quiet(name: str, level: int) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Positional(nn.Module):
    """Takes flat tensors under positional names, whatever the unit calls its own."""

    def __init__(self, unit: nn.Module, inputs: int) -> None:
        super().__init__()
        self.unit, self.inputs = unit, inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.unit(*tensors))


# Bytes of outputs that are copied in less time (5 us) than it takes to bind new memory to a graph (25 us).
_SMALL = 64 * 1024
