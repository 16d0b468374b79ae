"""The ways to run a full network without skipping: what a session has to beat."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dynanet.core.dynamic import everything, execute, forced
from dynanet.core.errors import InputError, StructureError, require
from dynanet.core.halt import Halt
from dynanet.core.plain import hooked
from dynanet.core.serving import FrameByFrame
from dynanet.mechanisms.early_stop import EarlyStop
from dynanet.session.engines import Eager, Engine, OnnxGraph, OnnxRuntime, exported, onnx_graph, onnx_runtime
from dynanet.session.plan import folded

FUSED: dict[type[nn.Module], type[nn.RNNBase]] = {nn.GRUCell: nn.GRU, nn.LSTMCell: nn.LSTM, nn.RNNCell: nn.RNN}


class LastAnswer(nn.Module):
    """The full network: every step, the last answer. A graph of it lacks what only earlier exits need.

    Args:
        model: any model.
        structure: of its input, whose tensors come one by one; None for a single tensor.
    """

    def __init__(self, model: nn.Module, structure: TreeSpec | None = None) -> None:
        super().__init__()
        self.model = model
        self._structure = structure

    def forward(self, *flat: Tensor) -> tuple[Tensor]:
        """The answers, (B, classes)."""
        x = flat[0] if self._structure is None else tree_unflatten(list(flat), self._structure)
        return (self.model.answers(x)[-1] if isinstance(self.model, Halt) else self.model(x),)


@torch.no_grad()
def dense_engines(
    model: nn.Module, x: Tensor, cache: Path | None = None, echo: Callable[[str], None] = lambda line: None
) -> dict[str, Engine]:
    """Make engines for inputs of one size: eager in both memory formats, and ONNX Runtime if it runs the network.

    Args:
        model: the full network.
        x: a batch.
        cache: of exported graphs.
        echo: called with a line if ONNX Runtime cannot run it.
    """
    model = execute(folded(model), sparse=False)
    example = x[:1].repeat(2, *[1] * (x.dim() - 1))
    with forced(model, everything):
        graph = exported(LastAnswer(model), [example]).module()
    eager = Eager(graph)
    engines: dict[str, Engine] = {"eager": eager}
    if x.dim() == 4:
        engines["eager channels_last"] = _ChannelsLast(eager)
    if onnx_runtime() is not None:
        threads = torch.get_num_threads()
        try:
            engines["onnxruntime"] = OnnxRuntime(graph, [example], threads=threads, workspaces=True, cache=cache)
        except StructureError as error:
            echo(f"ONNX Runtime cannot run the full network ({str(error)[:120]}...): eager is the rival")
    return engines


@torch.no_grad()
def rectangle_engines(model: nn.Module, x: Any, echo: Callable[[str], None] = lambda line: None) -> dict[str, Engine]:
    """Make engines for samples of different lengths: they take padded rectangles of any numbers of rows and steps.

    An EarlyStop around torch's own cell runs as torch's fused layer and as ONNX Runtime's, both over all frames, with
    the head once. Any other model runs eager, and in ONNX Runtime if it can be exported so.

    Args:
        model: the full network.
        x: a batch of two rows or more, and two steps or more.
        echo: called with a line if it cannot be exported to ONNX.
    """
    model = execute(folded(model), sparse=False)
    flat, structure = tree_flatten(x)
    threads = torch.get_num_threads()
    if isinstance(model, EarlyStop) and (net := _fused(model.frames.cell)) is not None:
        engines: dict[str, Engine] = {f"torch {type(net).__name__}": Eager(_FusedLast(net, model.frames.head))}
        if onnx_runtime() is not None:
            states = OnnxGraph(_recurrent_graph(net), threads)
            engines["onnxruntime"] = _WithHead(states, model.frames.head)
        return engines
    last = LastAnswer(model, structure)
    if isinstance(model, FrameByFrame):
        echo("no dense graph of its loop over frames, which is another one for every length: eager is the rival")
        return {"eager": _AllKept(last)}
    try:
        with forced(last, everything):
            program = exported(last, flat, lengths=True)
        engines = {"eager": Eager(program.module())}
        if onnx_runtime() is not None:
            engines["onnxruntime"] = OnnxGraph(onnx_graph(program), threads)
    except Exception as error:  # exporter and runtime have dozens of kinds for what they cannot do
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        echo(f"no dense graph of rectangles of any size ({reason}): eager is the rival")
        return {"eager": _AllKept(last)}
    return engines


@torch.no_grad()
def check_dense(engines: dict[str, Engine], model: nn.Module, whole: Sequence[Any], cut: Sequence[Any]) -> None:
    """Check that engines answer for cut batches what the model answers for whole ones, with nothing skipped.

    Args:
        engines: of `rectangle_engines`.
        model: theirs.
        whole: batches.
        cut: the same ones in their rectangles.

    Raises:
        InputError: answers differ.
    """
    model = execute(folded(model), sparse=False)
    for x, rectangle in zip(whole, cut, strict=True):
        flat, structure = tree_flatten(x)
        with forced(model, everything):
            (expected,) = LastAnswer(model, structure)(*flat)
        for name, engine in engines.items():
            (answer,) = engine(tree_flatten(rectangle)[0])
            differs = ~torch.isclose(answer, expected, rtol=1e-3, atol=1e-3).flatten(1).all(1)
            if bool(differs.any()):
                raise InputError(
                    f"{int(differs.sum())} of {len(answer)} answers of {name} to the padded rectangle of a batch "
                    f"differ from the dense model's; nothing is timed"
                )


class _ChannelsLast(Engine):
    """Another engine on channels-last images; the weights follow the input."""

    name = "eager channels_last"

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return self._engine([t.contiguous(memory_format=torch.channels_last) for t in inputs])


class _AllKept(Engine):
    """Eager, with everything kept."""

    name = "eager"

    def __init__(self, unit: nn.Module) -> None:
        self._unit = unit

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with forced(self._unit, everything):
            return list(self._unit(*inputs))


class _WithHead(Engine):
    """An engine for states, followed by the head in torch."""

    name = "onnxruntime"

    def __init__(self, states: Engine, head: nn.Module) -> None:
        self._states = states
        self._head = head

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [self._head(state) for state in self._states(inputs)]


class _FusedLast(nn.Module):
    """The head's answer to the state after every row's last frame."""

    def __init__(self, net: nn.RNNBase, head: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.head = head

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor]:
        states = self.net(x)[0]
        return (self.head(states[torch.arange(len(lengths)), lengths - 1]),)


def _fused(cell: nn.Module) -> nn.RNNBase | None:
    """Build torch's layer over whole sequences with a cell's weights; None for one that is not torch's or has hooks."""
    kind = FUSED.get(type(cell))
    if kind is None or hooked(cell):
        return None
    assert isinstance(cell, nn.RNNCellBase)
    more: dict[str, Any] = {"nonlinearity": cell.nonlinearity} if isinstance(cell, nn.RNNCell) else {}
    make: Callable[..., nn.RNNBase] = kind
    net = make(cell.input_size, cell.hidden_size, bias=cell.bias, batch_first=True, **more).to(cell.weight_ih)
    net.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    return net.eval().requires_grad_(False)


def _recurrent_graph(net: nn.RNNBase) -> bytes:
    """Build ONNX's recurrent layer: x (B, T, F) and lengths (B,) int64 to the states (B, H) after the last frames."""
    onnx = require("onnx", "onnx")
    helper = onnx.helper
    kind = type(net).__name__
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
        helper.make_node("Transpose", ["input_0"], ["frames"], perm=[1, 0, 2]),
        helper.make_node("Cast", ["input_1"], ["lengths"], to=onnx.TensorProto.INT32),
        helper.make_node(
            kind, ["frames", "w", "r", "b" if net.bias else "", "lengths"], ["", "last"],
            hidden_size=net.hidden_size, **more,
        ),
        helper.make_node("Squeeze", ["last", "first"], ["state"]),
    ]  # fmt: skip
    kept = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in given.items()]
    kept.append(helper.make_tensor("first", onnx.TensorProto.INT64, [1], [0]))
    values = [
        helper.make_tensor_value_info("input_0", onnx.TensorProto.FLOAT, ["B", "T", net.input_size]),
        helper.make_tensor_value_info("input_1", onnx.TensorProto.INT64, ["B"]),
        helper.make_tensor_value_info("state", onnx.TensorProto.FLOAT, ["B", net.hidden_size]),
    ]
    graph = helper.make_graph(nodes, "recurrent", values[:2], values[2:], kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
