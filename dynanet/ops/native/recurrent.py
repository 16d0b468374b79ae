"""Recurrent layers that skip or skim as operators: one call for all steps of a batch, decisions included.

Products, gates and the decision about the next step follow each other in the cache, every row at its own pace, without
Python between steps. Up to rounding, each operator returns what the layers' own code returns in float32.
"""

import ctypes
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from dynanet.core.plain import hooked
from dynanet.ops.native.library import Kernels, check_floats, chosen, fit, must, states

_LIBRARY = torch.library.Library("dynanet", "FRAGMENT")
_LIBRARY.define(
    "update_skip(Tensor x, Tensor lengths, Tensor packed, Tensor bias, Tensor delta, float shift, bool lstm, "
    "bool every_step) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "skim(Tensor x, Tensor lengths, Tensor[] packed, Tensor[] bias, Tensor score, float shift, float threshold, "
    "int skimmed, bool lstm, bool every_step) -> (Tensor, Tensor, Tensor)"
)


class Ready(NamedTuple):
    """The weights of a recurrent layer as the kernels read them.

    Attributes:
        packed: panels of each cell.
        bias: biases of each cell.
        score: weights of the linear that decides, (features,).
        shift: its bias.
        lstm: the cells are nn.LSTMCell, otherwise nn.GRUCell.
    """

    packed: list[Tensor]
    bias: list[Tensor]
    score: Tensor
    shift: float
    lstm: bool


class PackedCells:
    """The packed weights of cells and of the linear that decides; see `products.PackedWeights`.

    They are packed again when a weight was changed or exchanged. Where one of the modules has hooks, nothing runs
    natively.
    """

    def __init__(self) -> None:
        self._wide = 0
        self._of: list[object] = []
        self._state: list[tuple[int, int, bool] | None] = []
        self._ready: Ready | None = None

    def of(self, cells: Sequence[nn.Module], score: nn.Module, around: Sequence[nn.Module] = ()) -> Ready | None:
        """Pack the weights of a layer.

        None where native kernels cannot run it: there are none, the cells are not all nn.LSTMCell or all nn.GRUCell, a
        weight has a gradient or is not float32 on the CPU, or a module has hooks.

        Args:
            cells: from (x, state) to the next state.
            score: an nn.Linear to one number.
            around: modules that torch would call too, whose hooks count.
        """
        if not fit():
            return None
        modules = [*cells, score]
        if any(map(hooked, (*modules, *around))):
            return None
        weights = [p for m in modules for p in m._parameters.values()]
        if any(p is not None and p.is_inference() for p in weights):
            return None  # torch does not count their changes
        state = states(weights)
        kernels = chosen()
        those: list[object] = [*modules, *weights]
        assert kernels is not None
        there = len(those) == len(self._of) and all(map(operator.is_, those, self._of))
        if not there or self._wide != kernels.wide or state != self._state:
            self._of = those
            self._state = state
            self._wide = kernels.wide
            self._ready = _made(cells, score, weights, kernels)
        return self._ready

    def __reduce__(self) -> tuple[type["PackedCells"], tuple[()]]:
        return PackedCells, ()


def update_skip(x: Tensor, lengths: Tensor, ready: Ready, *, every_step: bool) -> tuple[Tensor, Tensor]:
    """Run a cell that decides after every update when the next one is (`mechanisms.update_skip`).

    Args:
        x: (B, T, inputs), float32 on the CPU; see `library.fit`.
        lengths: (B,) int64, from 1 to T.
        ready: of one cell, and a linear from its h.
        every_step: return the states of all steps.

    Returns:
        h (B, hidden), or (B, T, hidden), and (B, T), 1 where a row was updated.
    """
    packed, bias, score, shift, lstm = ready
    return torch.ops.dynanet.update_skip(x, lengths, packed[0], bias[0], score, shift, lstm, every_step)


def skim(
    x: Tensor, lengths: Tensor, ready: Ready, *, skimmed: int, threshold: float, every_step: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a big cell where a step's score is above the threshold, a small one elsewhere (`mechanisms.skim`).

    Args:
        x: (B, T, inputs), float32 on the CPU; see `library.fit`.
        lengths: (B,) int64, from 1 to T.
        ready: of the big cell and the small one, and a linear from the input and h.
        skimmed: number of state features that the small cell updates.
        threshold: of the score.
        every_step: return the states of all steps.

    Returns:
        h (B, hidden), or (B, T, hidden); (B, T), 1 where the big cell ran; scores (B, T), of padding too.
    """
    packed, bias, score, shift, lstm = ready
    return torch.ops.dynanet.skim(x, lengths, packed, bias, score, shift, threshold, skimmed, lstm, every_step)


def _made(cells: Sequence[nn.Module], score: nn.Module, weights: Sequence[Tensor | None], kernels: Kernels) -> Any:
    kinds = {type(cell) for cell in cells}
    if kinds not in ({nn.LSTMCell}, {nn.GRUCell}) or type(score) is not nn.Linear or score.out_features != 1:
        return None
    if any(p is not None and (p.requires_grad or p.dtype is not torch.float32 or not p.is_cpu) for p in weights):
        return None
    with torch.no_grad():
        packed, bias = zip(*(_chunks(cell, kernels) for cell in cells), strict=True)
        shift = 0.0 if score.bias is None else float(score.bias)
        return Ready(list(packed), list(bias), score.weight.detach().flatten().clone(), shift, kinds == {nn.LSTMCell})


def _chunks(cell: Any, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Panels (panels, depth, wide) in which all gates of a chunk of hidden units lie together, and their biases."""
    hidden = cell.hidden_size
    wide = kernels.wide
    lstm = isinstance(cell, nn.LSTMCell)
    weight = torch.cat([cell.weight_ih, cell.weight_hh], 1).unflatten(0, (-1, hidden))
    none = weight.new_zeros(weight.shape[0] * hidden)
    of_input, of_state = (none if b is None else b for b in (cell.bias_ih, cell.bias_hh))
    biases = torch.stack([of_input + of_state, none] if lstm else [of_input, of_state]).unflatten(1, (-1, hidden))
    panels, shifts = [], []
    for h in range(0, hidden, wide):
        units = weight[:, h : h + wide].flatten(0, 1)
        padding = -units.shape[0] % wide
        panels.append(functional.pad(units, (0, 0, 0, padding)).unflatten(0, (-1, wide)).transpose(1, 2))
        shifts.append(functional.pad(biases[:, :, h : h + wide].flatten(1), (0, padding)))
    packed = kernels.room(sum(p.shape[0] for p in panels), weight.shape[2], wide)
    return torch.cat(panels, out=packed) if packed.numel() else packed, torch.cat(shifts, 1).contiguous()


class _Cell(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("lstm", "hidden", "pieces", "split")),
        ("sizes", ctypes.c_long * 3),
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class _Sequences(ctypes.Structure):
    _fields_ = [
        ("cell", _Cell),
        ("small", _Cell),
        *((name, ctypes.c_long) for name in ("batch", "steps", "inputs", "every")),
        *((name, ctypes.c_void_p) for name in ("x", "lengths", "score")),
        *((name, ctypes.c_float) for name in ("shift", "threshold")),
        *((name, ctypes.c_void_p) for name in ("answer", "kept", "scores", "states", "c", "at", "going", "side")),
        *((name, ctypes.c_void_p) for name in ("from", "old", "to", "memory")),
    ]


def _update_skip(
    x: Tensor, lengths: Tensor, packed: Tensor, bias: Tensor, delta: Tensor, shift: float, lstm: bool, every_step: bool
) -> tuple[Tensor, Tensor]:
    hidden, kernels = delta.shape[0], chosen()
    assert kernels is not None
    cell = _cell(packed, bias, hidden, (x.shape[2], hidden), lstm, kernels)
    answer, kept, _ = _run(kernels.update_skip, x, lengths, [cell], delta, hidden, (shift, 0.0), every_step)
    return answer, kept


def _skim(
    x: Tensor,
    lengths: Tensor,
    packed: list[Tensor],
    bias: list[Tensor],
    score: Tensor,
    shift: float,
    threshold: float,
    skimmed: int,
    lstm: bool,
    every_step: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs, kernels = x.shape[2], chosen()
    hidden = score.shape[0] - inputs
    assert kernels is not None
    must(0 < skimmed < hidden, f"a state of {hidden} features of which {skimmed} are updated")
    big = _cell(packed[0], bias[0], hidden, (inputs, hidden), lstm, kernels)
    small = _cell(packed[1], bias[1], skimmed, (inputs, hidden - skimmed, skimmed), lstm, kernels)
    return _run(kernels.skim, x, lengths, [big, small], score, hidden, (shift, threshold), every_step)


def _cell(packed: Tensor, bias: Tensor, hidden: int, sizes: Sequence[int], lstm: bool, kernels: Kernels) -> _Cell:
    gates, wide = 4 if lstm else 3, kernels.wide
    panels = hidden // wide * gates + -(-gates * (hidden % wide) // wide)
    check_floats(packed, bias)
    must(packed.shape == (panels, sum(sizes), wide), f"packed weights of shape {tuple(packed.shape)}")
    must(bias.shape == (2, panels * wide), f"biases of shape {tuple(bias.shape)}")
    three = (ctypes.c_long * 3)(*sizes)
    return _Cell(lstm, hidden, len(sizes), len(sizes) - 1, three, packed.data_ptr(), bias.data_ptr())


def _run(
    kernel: Any,
    x: Tensor,
    lengths: Tensor,
    cells: list[_Cell],
    score: Tensor,
    hidden: int,
    numbers: tuple[float, float],
    every_step: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    lengths = lengths.contiguous()
    check_floats(x, score)
    batch, steps, inputs = x.shape
    shift, threshold = numbers
    must(lengths.shape == (batch,) and lengths.dtype is torch.int64 and lengths.is_cpu, "lengths that are not int64")
    answer = x.new_empty(batch, steps, hidden) if every_step else x.new_empty(batch, hidden)
    kept, scores = x.new_zeros(batch, steps), x.new_empty(batch, steps)
    memory, places = x.new_empty(3, batch, hidden), lengths.new_empty(10, batch)
    row = [places[i].data_ptr() for i in range(10)]  # at, going (2), side, from (3), old, to, memory
    sequences = _Sequences(
        cells[0], cells[-1], batch, steps, inputs, every_step, x.data_ptr(), lengths.data_ptr(), score.data_ptr(),
        shift, threshold, answer.data_ptr(), kept.data_ptr(), scores.data_ptr(), memory.data_ptr(),
        memory[2].data_ptr(), row[0], row[1], row[3], row[4], row[7], row[8], row[9],
    )  # fmt: skip
    must(kernel(ctypes.byref(sequences), torch.get_num_threads()), "a sequence of no step, or of more than there are")
    return answer, kept, scores


def _shapes(x: Tensor, hidden: int, every_step: bool) -> tuple[Tensor, Tensor, Tensor]:
    lead = x.shape[:2] if every_step else x.shape[:1]
    return x.new_empty(*lead, hidden), x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


_LIBRARY.impl("update_skip", _update_skip, "CPU")
_LIBRARY.impl("skim", _skim, "CPU")
_LIBRARY.impl("update_skip", lambda x, le, p, b, delta, s, lstm, every: _shapes(x, delta.shape[0], every)[:2], "Meta")
_LIBRARY.impl("skim", lambda x, le, p, b, w, s, at, k, lstm, every: _shapes(x, w.shape[0] - x.shape[2], every), "Meta")


def _macs(lstm: bool, hidden: int, depth: int) -> int:
    return (4 if lstm else 3) * hidden * depth


@register_flop_formula(torch.ops.dynanet.update_skip, get_raw=True)
def _update_skip_flops(
    x: Tensor, lengths: Tensor, packed: Tensor, bias: Any, delta: Tensor, shift: float, lstm: bool, *_: Any,
    out_val: Any, **__: Any,
) -> int:  # fmt: skip
    """As torch counts: two for a multiply-accumulate. Padding of a panel is not counted."""
    hidden = delta.shape[0]
    return 2 * int(out_val[1].sum()) * (_macs(lstm, hidden, x.shape[2] + hidden) + hidden)


@register_flop_formula(torch.ops.dynanet.skim, get_raw=True)
def _skim_flops(
    x: Tensor, lengths: Tensor, packed: Any, bias: Any, score: Tensor, shift: float, at: float, skimmed: int,
    lstm: bool, *_: Any, out_val: Any, **__: Any,
) -> int:  # fmt: skip
    depth, reads = score.shape[0], int(out_val[1].sum())
    hidden = depth - x.shape[2]
    cells = reads * _macs(lstm, hidden, depth) + (int(lengths.sum()) - reads) * _macs(lstm, skimmed, depth)
    return 2 * (cells + x.shape[0] * x.shape[1] * depth)
