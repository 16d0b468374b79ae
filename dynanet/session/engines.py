"""Engines run one static unit: eager PyTorch, or an ONNX Runtime graph. Flat tensors in and out.

A unit is a function of tensors whose first axis is the rows, with nothing dynamic inside. This is the only file that
exports to ONNX or opens ONNX Runtime.
"""

import copy
import functools
import hashlib
import io
import logging
import math
import os
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

from dynanet.core.errors import MissingExtraError, StructureError, require
from dynanet.core.files import write_atomically

log = logging.getLogger(__name__)


class Engine(ABC):
    """Runs a unit.

    Attributes:
        name: of the engine, in reports.
    """

    name: str

    @abstractmethod
    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compute the unit's outputs for one row or more.

        With workspaces on, an output is valid only until the next call.
        """


class Eager(Engine):
    """PyTorch itself: the fallback, and the engine on GPUs."""

    name = "eager"

    def __init__(self, unit: nn.Module) -> None:
        self.unit = unit

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compute the unit's outputs."""
        return list(self.unit(*inputs))


class OnnxGraph(Engine):
    """A graph in ONNX Runtime, fed by name; any axis may be free. `OnnxRuntime` is quicker where only rows are.

    Args:
        graph: serialised. Its inputs are named `input_0`, `input_1`, ... in the order of the call; it may lack those
            that it does not read.
        threads: of the runtime.

    Attributes:
        runtime: the inference session.
        reads: positions of the inputs that the graph reads.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """

    name = "onnxruntime"

    def __init__(self, graph: bytes, threads: int) -> None:
        module = require("onnxruntime", "onnx")
        options = module.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that spin while they wait take the cores from torch's, and torch's from them: 4 times slower on two.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4
        self.runtime = module.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.reads = [int(node.name.removeprefix("input_")) for node in self.runtime.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compute the graph's outputs."""
        given = {f"input_{i}": inputs[i].numpy() for i in self.reads}
        return [torch.from_numpy(out) for out in self.runtime.run(None, given)]


class OnnxRuntime(Engine):
    """A unit as one ONNX Runtime graph for all numbers of rows, its tensors bound in place.

    The graph is exported once and kept in the cache, under a hash of what it computes.

    Args:
        unit: maps flat tensors to a tuple of tensors, on the CPU.
        inputs: an example, two rows or more.
        threads: of the runtime.
        workspaces: write into buffers that the next call writes again. Fresh large allocations cost more in page
            faults than the copy they hold; but then a result must be used before the next call.
        cache: folder of exported graphs; `cache_folder()` if None.

    Raises:
        MissingExtraError: onnxruntime (or, for a graph that is not in the cache, onnx and onnxscript) is missing.
        StructureError: the unit cannot be exported, or the graph's outputs differ from the unit's.
    """

    name = "onnxruntime"

    def __init__(
        self, unit: nn.Module, inputs: Sequence[Tensor], *, threads: int, workspaces: bool, cache: Path | None = None
    ) -> None:
        require("onnxruntime", "onnx")
        with torch.no_grad():
            outputs = unit(*inputs)
        self._threads = threads
        self._workspaces = workspaces
        self._chunk = 0
        try:
            program = exported(unit, inputs)
            path = (cache if cache is not None else cache_folder()) / f"{_digest(program, inputs)}.onnx"
            try:
                self._open(path.read_bytes(), inputs, outputs)
            except Exception:  # not kept yet, damaged, or of another version of the runtime
                graph = onnx_graph(program)
                _keep(graph, path)
                self._open(graph, inputs, outputs)
        except MissingExtraError:
            raise
        except Exception as error:  # exporter and runtime have dozens of kinds for what they cannot do
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise StructureError(f"a part that ONNX Runtime cannot run ({reason}); use eager engines") from error

    def _open(self, graph: bytes, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        opened = OnnxGraph(graph, self._threads)
        self._runtime = opened.runtime
        self._inputs = [(f"input_{i}", i, inputs[i][:1].numel() * inputs[i].element_size()) for i in opened.reads]
        self._outputs = [
            (node.name, tuple(t.shape[1:]), t.dtype)
            for node, t in zip(self._runtime.get_outputs(), outputs, strict=True)
        ]
        self._output_bytes = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self._outputs)
        self._buffers: list[Tensor] = []
        self._bindings: dict[int, _Bindings] = {}
        for ours, theirs in zip(self(inputs), outputs, strict=True):
            if theirs.is_floating_point() and not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3, equal_nan=True):
                raise StructureError("its graph answers something else than the part itself")

    def chunked(self, rows: int) -> "OnnxRuntime":
        """Make an engine that feeds the same graph `rows` rows at a time: small activations stay in the cache."""
        other = copy.copy(self)
        other.name = f"{self.name}, {rows} at a time"
        other._chunk = rows
        other._buffers = []
        other._bindings = {}
        return other

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compute the unit's outputs, bound without a copy."""
        rows = inputs[0].shape[0]
        inputs = [t if t.is_contiguous() else t.contiguous() for t in inputs]
        bindings = self._bindings.get(rows) or self._bind(rows)
        for first, n, binding, bound in bindings.runs:
            for i, (name, which, row_bytes) in enumerate(self._inputs):
                t = inputs[which]
                address = t.data_ptr() + first * row_bytes
                if bound[i] != address:  # with workspaces most addresses are those of the last such call
                    binding.bind_input(name, "cpu", 0, _NUMPY[t.dtype], (n, *t.shape[1:]), address)
                    bound[i] = address
            self._runtime.run_with_iobinding(binding)
        if self._workspaces or not bindings.again:
            return bindings.outputs
        return [t.clone() for t in bindings.outputs]

    def _bind(self, rows: int) -> "_Bindings":
        """Bind outputs for calls with `rows` rows.

        The bindings serve later calls too if outputs lie in workspaces. Small outputs always do, and are copied: that
        is quicker than binding new memory.
        """
        again = self._workspaces or rows * self._output_bytes <= _SMALL
        if again:
            if not self._buffers or self._buffers[0].shape[0] < rows:
                self._buffers = [torch.empty(rows, *shape, dtype=dtype) for _, shape, dtype in self._outputs]
                self._bindings.clear()
            outputs = [buffer[:rows] for buffer in self._buffers]
        else:
            outputs = [torch.empty(rows, *shape, dtype=dtype) for _, shape, dtype in self._outputs]
        runs = []
        step = self._chunk or rows
        for first in range(0, rows, step):
            n = min(step, rows - first)
            binding = self._runtime.io_binding()
            for (name, shape, dtype), out in zip(self._outputs, outputs, strict=True):
                address = out.data_ptr() + first * out.stride(0) * out.element_size()
                binding.bind_output(name, "cpu", 0, _NUMPY[dtype], (n, *shape), address)
            runs.append((first, n, binding, [0] * len(self._inputs)))
        bindings = _Bindings(outputs, runs, again)
        if again:
            self._bindings[rows] = bindings
        return bindings


class _Bindings(NamedTuple):
    """The bound memory of a call.

    Attributes:
        outputs: of all rows.
        runs: first row, rows, binding, and the addresses of the bound inputs, of every run of the graph.
        again: the next call with as many rows uses them too.
    """

    outputs: list[Tensor]
    runs: list[tuple[int, int, Any, list[int]]]
    again: bool


@functools.cache
def onnx_runtime() -> ModuleType | None:
    """Return the onnxruntime module; None, logged once, where it is not installed."""
    try:
        return require("onnxruntime", "onnx")
    except MissingExtraError as error:
        log.warning("running eager: %s", error)
        return None


def cache_folder() -> Path:
    """Return the folder of exported graphs: $DYNANET_CACHE, or dynanet/engines in the user's cache folder."""
    home = (
        os.environ.get("DYNANET_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynanet"
    )
    return Path(home) / "engines"


def exported(unit: nn.Module, inputs: Sequence[Tensor], *, lengths: bool = False) -> torch.export.ExportedProgram:
    """Export a unit as a program with a free number of rows.

    Args:
        unit: maps flat tensors to a tuple of tensors.
        inputs: an example, two rows or more.
        lengths: the second axis is free too.
    """
    rows = torch.export.Dim("rows")
    steps = torch.export.Dim.AUTO
    free = tuple({0: rows, 1: steps} if lengths and t.dim() > 1 else {0: rows} for t in inputs)
    with _quiet():
        return torch.export.export(_Positional(unit), tuple(inputs), dynamic_shapes=(free,))


def onnx_graph(program: torch.export.ExportedProgram) -> bytes:
    """Convert a program to a serialised graph, as `OnnxGraph` takes it.

    Raises:
        MissingExtraError: onnxscript is not installed.
    """
    require("onnxscript", "onnx")
    names = [f"input_{i}" for i in range(len(program.graph_signature.user_inputs))]
    with _quiet():
        converted = torch.onnx.export(program, dynamo=True, verbose=False, input_names=names)
    assert converted is not None
    return converted.model_proto.SerializeToString()


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64, torch.bool: np.bool_}


def _digest(program: torch.export.ExportedProgram, inputs: Sequence[Tensor]) -> str:
    """Hash all that a program computes with."""
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
    return digest.hexdigest()


def _keep(graph: bytes, path: Path) -> None:
    """Write a graph to the cache, if that is possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(graph))
    except OSError as error:
        log.warning("exported graphs cannot be kept in %s (%s); set DYNANET_CACHE", path.parent, error.strerror)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters: they print at length what they cannot do, and warn of their own deprecations."""
    loggers = [logging.getLogger(name) for name in ("torch.fx", "torch.onnx", "torch.export")]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)


class _Positional(nn.Module):
    """Takes flat tensors under positional names, whatever the unit's own arguments are called."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.unit(*tensors))


# Bytes of outputs that are copied in less time (5 us) than it takes to bind new memory to a graph (25 us).
_SMALL = 64 * 1024
