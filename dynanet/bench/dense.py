"""The ways to run a full network without skipping: what a session has to beat."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dynanet.core.dynamic import everything, execute, forced
from dynanet.core.errors import InputError, StructureError, require
from dynanet.core.halt import Halt
from dynanet.core.serving import FrameByFrame
from dynanet.mechanisms.early_stop import EarlyStop
from dynanet.session.engines import Eager, Engine, OnnxRuntime, folded, onnx_runtime

FUSED: dict[type[nn.Module], type[nn.RNNBase]] = {nn.GRUCell: nn.GRU, nn.LSTMCell: nn.LSTM, nn.RNNCell: nn.RNN}


class Last(nn.Module):
    """The full network: every step, the last answer. What it does not need (earlier exits) drops out of a graph of it.

    Args:
        model: any.
        structure: of its input, whose tensors come one by one; None for a single tensor.
    """

    def __init__(self, model: nn.Module, structure: TreeSpec | None = None) -> None:
        super().__init__()
        self.model, self._structure = model, structure

    def forward(self, *flat: Tensor) -> tuple[Tensor]:
        """The answers, (B, classes)."""
        x = flat[0] if self._structure is None else tree_unflatten(list(flat), self._structure)
        return (self.model.answers(x)[-1] if isinstance(self.model, Halt) else self.model(x),)


def dense_engines(
    model: nn.Module, x: Tensor, cache: Path | None = None, echo: Callable[[str], None] = lambda line: None
) -> dict[str, Engine]:
    """For inputs of one size: eager in both memory formats, and ONNX Runtime if it can run the whole network.

    Args:
        model: the full network.
        x: a batch.
        cache: of exported graphs.
        echo: gets a line where ONNX Runtime cannot.
    """
    model = execute(folded(model), sparse=False)
    example = x[:1].repeat(2, *[1] * (x.dim() - 1))
    with torch.no_grad(), forced(model, everything):
        batch = torch.export.Dim("batch")
        graph = torch.export.export(Last(model), (example,), dynamic_shapes=(({0: batch},),)).module()
        engines: dict[str, Engine] = {"eager": Eager(graph)}
        if x.dim() == 4:
            engines["eager channels_last"] = _ChannelsLast(graph)
        if onnx_runtime() is not None:
            threads = torch.get_num_threads()
            try:
                engines["onnxruntime"] = OnnxRuntime(graph, [example], threads=threads, workspaces=True, cache=cache)
            except StructureError as error:
                echo(f"ONNX Runtime cannot run the full network ({str(error)[:120]}...): eager is the rival")
    return engines


@torch.no_grad()
def rectangle_engines(model: nn.Module, x: Any, echo: Callable[[str], None] = lambda line: None) -> dict[str, Engine]:
    """For samples of different lengths: engines that take the padded rectangle of a batch, however many rows and steps.

    Of an EarlyStop around torch's own cell: torch's fused layer, and ONNX Runtime's, both over all frames, with the
    head once. Of anything else: eager, and ONNX Runtime if it can be exported so.

    Args:
        model: the full network.
        x: a batch of two rows or more, and two steps or more.
        echo: gets a line where there is no ONNX Runtime graph.
    """
    model = execute(folded(model), sparse=False)
    flat, structure = tree_flatten(x)
    if isinstance(model, EarlyStop) and (net := _fused(model.frames.cell)) is not None:
        engines: dict[str, Engine] = {f"torch {type(net).__name__}": Eager(_FusedLast(net, model.frames.head))}
        if onnx_runtime() is not None:
            engines["onnxruntime"] = _OnnxRecurrent(net, model.frames.head)
        return engines
    last = Last(model, structure)
    if isinstance(model, FrameByFrame):
        echo("no dense graph of its loop over frames, which is another one for every length: eager is the rival")
        return {"eager": _Forced(last)}
    try:
        program = _program(last, flat)
        engines = {"eager": Eager(program.module())}
        if onnx_runtime() is not None:
            engines["onnxruntime"] = _AnyLength(program)
    except Exception as error:  # exporter and runtime have dozens of kinds for what they cannot do
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        echo(f"no dense graph of rectangles of any size ({reason}): eager is the rival")
        return {"eager": _Forced(last)}
    return engines


@torch.no_grad()
def check_dense(engines: dict[str, Engine], model: nn.Module, whole: Sequence[Any], cut: Sequence[Any]) -> None:
    """Every engine answers for the cut batches what the model does for the whole ones, nothing skipped.

    Args:
        engines: of `rectangle_engines`.
        model: theirs.
        whole: batches.
        cut: the same ones in their rectangles.

    Raises:
        InputError: one does not.
    """
    model = execute(folded(model), sparse=False)
    for x, rectangle in zip(whole, cut, strict=True):
        flat, structure = tree_flatten(x)
        with forced(model, everything):
            (expected,) = Last(model, structure)(*flat)
        for name, engine in engines.items():
            (answer,) = engine(tree_flatten(rectangle)[0])
            differs = ~torch.isclose(answer, expected, rtol=1e-3, atol=1e-3).flatten(1).all(1)
            if bool(differs.any()):
                raise InputError(
                    f"{int(differs.sum())} of {len(answer)} answers of {name} to the padded rectangle of a batch "
                    f"differ from the dense model's; nothing is timed"
                )


class _ChannelsLast(Eager):
    """Eager on channels-last images; the weights follow the input."""

    name = "eager channels_last"

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The unit's outputs."""
        return super().__call__([t.contiguous(memory_format=torch.channels_last) for t in inputs])


class _Forced(Eager):
    """Eager, with everything kept."""

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The unit's outputs."""
        with forced(self.unit, everything):
            return super().__call__(inputs)


def _fused(cell: nn.Module) -> nn.RNNBase | None:
    """Torch's layer over whole sequences with a cell's weights; None of a cell that is not torch's."""
    kind = FUSED.get(type(cell))
    if kind is None:
        return None
    assert isinstance(cell, nn.RNNCellBase)
    more = {"nonlinearity": cell.nonlinearity} if isinstance(cell, nn.RNNCell) else {}
    net = kind(cell.input_size, cell.hidden_size, bias=cell.bias, batch_first=True, **more).to(cell.weight_ih)
    net.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    return net.eval().requires_grad_(False)


class _FusedLast(nn.Module):
    """The head's answer to the state after every row's last frame."""

    def __init__(self, net: nn.RNNBase, head: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, head

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor]:
        states = self.net(x)[0]
        return (self.head(states[torch.arange(len(lengths)), lengths - 1]),)


class _OnnxRecurrent(Engine):
    """ONNX Runtime's own recurrent layer, which is told the lengths; then the head, in torch."""

    name = "onnxruntime"

    def __init__(self, net: nn.RNNBase, head: nn.Module) -> None:
        self._runtime, self._head = _opened(_recurrent_graph(net)), head

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The head's answers."""
        x, lengths = inputs
        (state,) = self._runtime.run(None, {"x": x.numpy(), "lengths": lengths.int().numpy()})
        return [self._head(torch.from_numpy(state))]


def _recurrent_graph(net: nn.RNNBase) -> bytes:
    """x (B, T, F) and lengths (B,) to the states (B, H) after the last frames."""
    onnx = require("onnx", "onnx")
    helper, kind = onnx.helper, type(net).__name__
    # Torch has reset, update, new and in, forget, cell, out; ONNX update, reset, new and in, out, forget, cell.
    order = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2), "RNN": (0,)}[kind]

    def weights(name: str) -> Tensor:
        parts = getattr(net, f"{name}_l0").detach().chunk(len(order))
        return torch.cat([parts[i] for i in order])[None]

    given = {"w": weights("weight_ih"), "r": weights("weight_hh")}
    if net.bias:
        given["b"] = torch.cat([weights("bias_ih"), weights("bias_hh")], 1)
    more: dict[str, Any] = {"GRU": {"linear_before_reset": 1}}.get(kind, {})
    if isinstance(net, nn.RNN):
        more = {"activations": [net.nonlinearity.capitalize()]}
    nodes = [
        helper.make_node("Transpose", ["x"], ["frames"], perm=[1, 0, 2]),
        helper.make_node(
            kind, ["frames", "w", "r", "b" if net.bias else "", "lengths"], ["", "last"],
            hidden_size=net.hidden_size, **more,
        ),
        helper.make_node("Squeeze", ["last", "first"], ["state"]),
    ]  # fmt: skip
    kept = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in given.items()]
    kept.append(helper.make_tensor("first", onnx.TensorProto.INT64, [1], [0]))
    values = [
        helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["B", "T", net.input_size]),
        helper.make_tensor_value_info("lengths", onnx.TensorProto.INT32, ["B"]),
        helper.make_tensor_value_info("state", onnx.TensorProto.FLOAT, ["B", net.hidden_size]),
    ]
    graph = helper.make_graph(nodes, "recurrent", values[:2], values[2:], kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """What exporters cannot do, they print at length; and their deprecations are not ours."""
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


def _program(unit: Last, inputs: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """Of any number of rows and steps."""
    rows, steps = torch.export.Dim("rows"), torch.export.Dim.AUTO
    free = tuple({0: rows, 1: steps} if t.dim() > 1 else {0: rows} for t in inputs)
    with _quiet(), forced(unit, everything):
        return torch.export.export(unit, tuple(inputs), dynamic_shapes=(free,))


class _AnyLength(Engine):
    """ONNX Runtime, with a graph of rectangles of any size."""

    name = "onnxruntime"

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        require("onnxscript", "onnx")
        names = [f"input_{i}" for i in range(len(program.graph_signature.user_inputs))]
        with _quiet():
            exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=names)
        assert exported is not None
        self._runtime = _opened(exported.model_proto.SerializeToString())
        self._used = [node.name for node in self._runtime.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The unit's outputs."""
        given = {name: inputs[int(name.removeprefix("input_"))].numpy() for name in self._used}
        return [torch.from_numpy(out) for out in self._runtime.run(None, given)]


def _opened(graph: bytes) -> Any:
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as in `OnnxRuntime`
    options.log_severity_level = 4
    return runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
