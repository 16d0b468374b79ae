"""Blocks of neurons as two operators: up to the hidden neurons that rows keep, and down from them.

They are fast by their order of reading: weights that any row keeps are read once, in the order of memory and ahead of
time, and no others. With few rows, and weights larger than the caches, the time is that of reading.
"""

import ctypes

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynanet.ops.native.library import address, chosen, must

_LIBRARY = torch.library.Library("dynanet", "FRAGMENT")
_LIBRARY.define("neurons_up(Tensor x, Tensor weight, Tensor? bias, Tensor keep, bool relu) -> Tensor")
_LIBRARY.define("neurons_down(Tensor hidden, Tensor weight, Tensor? bias, Tensor keep) -> Tensor")


def neurons_up(x_RD: Tensor, weight_HD: Tensor, bias_H: Tensor | None, keep_RB: Tensor, *, relu: bool) -> Tensor:
    """Apply a linear map to the hidden neurons whose block a row keeps; 0 for the others.

    Args:
        x_RD: rows, (R, D). All tensors are float32 on the CPU; see `library.fit`.
        weight_HD: (H, D), contiguous.
        bias_H: (H,), or None.
        keep_RB: above 0 where a row keeps a block of H / B neurons, (R, B).
        relu: apply a ReLU.

    Returns:
        (R, H).
    """
    return torch.ops.dynanet.neurons_up(x_RD, weight_HD, bias_H, keep_RB, relu)


def neurons_down(hidden_RH: Tensor, weight_HO: Tensor, bias_O: Tensor | None, keep_RB: Tensor) -> Tensor:
    """Apply a linear map from the hidden neurons whose block a row keeps; the others are not read.

    Args:
        hidden_RH: (R, H).
        weight_HO: (H, O), contiguous: a block lies in one piece.
        bias_O: (O,), or None.
        keep_RB: above 0 where a row keeps a block, (R, B).

    Returns:
        (R, O).
    """
    return torch.ops.dynanet.neurons_down(hidden_RH, weight_HO, bias_O, keep_RB)


def _up(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, relu: bool) -> Tensor:
    hidden, inputs = weight.shape
    _check(x, weight, bias, keep, (inputs, hidden), hidden)
    rows = x.shape[0]
    blocks = keep.shape[1]
    answer = x.new_zeros(rows, hidden)
    kernels = chosen()
    assert kernels is not None
    x = x.contiguous()
    keep = keep.contiguous()
    kernels.neurons_up(
        rows, inputs, blocks, hidden // blocks, x.data_ptr(), weight.data_ptr(), address(bias), keep.data_ptr(), relu,
        answer.data_ptr(), (ctypes.c_int * rows)(),
    )  # fmt: skip
    return answer


def _down(hidden: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor) -> Tensor:
    rows = hidden.shape[0]
    neurons, outputs = weight.shape
    blocks = keep.shape[1]
    _check(hidden, weight, bias, keep, (neurons, outputs), neurons)
    answer = hidden.new_zeros(rows, outputs)
    kernels = chosen()
    assert kernels is not None
    if bias is not None:
        answer += bias
    hidden = hidden.contiguous()
    keep = keep.contiguous()
    kernels.neurons_down(
        rows, outputs, blocks, neurons // blocks, hidden.data_ptr(), weight.data_ptr(), keep.data_ptr(),
        answer.data_ptr(), (ctypes.c_int * rows)(),
    )  # fmt: skip
    return answer


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, sizes: tuple[int, int], neurons: int) -> None:
    there = [t for t in (x, weight, bias, keep) if t is not None]
    must(all(t.dtype is torch.float32 and t.is_cpu for t in there), "tensors that are not float32 on the CPU")
    must(weight.is_contiguous(), "weights that do not lie in one piece")
    must(bias is None or (bias.is_contiguous() and bias.shape == sizes[1:]), "a bias of another shape")
    must(x.dim() == 2 and x.shape[1] == sizes[0], "rows of another shape")
    must(keep.dim() == 2 and keep.shape[0] == x.shape[0], "decisions about other rows")
    must(keep.shape[1] > 0 and neurons % keep.shape[1] == 0, "blocks that do not divide the neurons")


_LIBRARY.impl("neurons_up", _up, "CPU")
_LIBRARY.impl("neurons_down", _down, "CPU")
_LIBRARY.impl("neurons_up", lambda x, weight, bias, keep, relu: x.new_empty(x.shape[0], weight.shape[0]), "Meta")
_LIBRARY.impl("neurons_down", lambda h, weight, bias, keep: h.new_empty(h.shape[0], weight.shape[1]), "Meta")


def _products(keep: Tensor, weight: Tensor) -> int:
    """FLOPs, as torch counts them: two for a multiply-accumulate."""
    return 2 * int((keep > 0).sum()) * (weight.numel() // keep.shape[1])


@register_flop_formula(torch.ops.dynanet.neurons_up, get_raw=True)
def _up_flops(x: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, relu: bool, **_: object) -> int:
    return _products(keep, weight)


@register_flop_formula(torch.ops.dynanet.neurons_down, get_raw=True)
def _down_flops(hidden: Tensor, weight: Tensor, bias: Tensor | None, keep: Tensor, **_: object) -> int:
    return _products(keep, weight)
