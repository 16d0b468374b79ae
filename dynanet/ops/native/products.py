"""Products of gathered rows with packed weights as operators: experts, and convolutions at chosen positions.

Rows of the left matrix are read where they lie, through an index: nothing is gathered first, no neighbourhoods are
copied side by side. Rows may come in groups with weights of their own (experts). Answers may be scaled, and added at
the places of another index: nothing is scattered afterwards.
"""

import ctypes
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from dynanet.ops.native.library import Kernels, address, check_floats, chosen, must, states

TAPS = 64
"""The most pieces that a row of the left matrix may have."""

_LIBRARY = torch.library.Library("dynanet", "FRAGMENT")
_LIBRARY.define(
    "product(Tensor rows, Tensor packed, Tensor? bias, int outputs, int[] counts, Tensor? around, bool relu) -> Tensor"
)
_LIBRARY.define(
    "product_add_(Tensor(a!) answer, Tensor rows, Tensor packed, Tensor? bias, int[] counts, Tensor? around, "
    "bool relu, Tensor to, Tensor? scale) -> ()"
)


class PackedWeights:
    """Weights as the kernels read them, panel by panel; packed once, and again when a weight has changed.

    Only for weights without a gradient: training changes weights at every step. A session freezes its model. The
    panels take the weights' memory a second time: 4 bytes per weight, outputs rounded up to whole panels. They are not
    copied with their owner. A change through `weight.data`, which torch does not count, is not noticed.
    """

    def __init__(self) -> None:
        self._wide = 0
        self._of: list[Tensor | None] = []
        self._state: list[tuple[int, int, bool] | None] = []
        self._packed: Tensor | None = None
        self._bias: Tensor | None = None

    def of(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None] | None:
        """Pack the weights of groups of rows.

        Args:
            weights: per group (outputs, depth) or, of a convolution, (outputs, channels, height, width); equal shapes.
            biases: (outputs,) each, or None for all.

        Returns:
            The panels and the biases (groups, outputs); None if a weight has a gradient or is not float32 on the CPU.
        """
        tensors = [*weights, *biases]
        kernels = chosen()
        assert kernels is not None
        if any(t is not None and t.is_inference() for t in weights):
            return None  # torch does not count their changes
        state = states(tensors)  # a few microseconds, which show with one row
        if (
            self._packed is not None
            and self._wide == kernels.wide
            and state == self._state
            and all(map(operator.is_, tensors, self._of))
        ):
            return self._packed, self._bias
        self._packed = None
        if any(t is not None and (t.requires_grad or t.dtype is not torch.float32 or not t.is_cpu) for t in tensors):
            return None
        bias = [b.detach() for b in biases if b is not None]
        self._packed = _panels(weights, kernels)
        self._bias = torch.stack(bias) if bias else None
        self._wide = kernels.wide
        self._of = tensors
        self._state = state
        return self._packed, self._bias

    def __reduce__(self) -> Any:
        return PackedWeights, ()


def product(
    rows: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    outputs: int,
    *,
    counts: Sequence[int],
    around: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Apply linear maps to gathered rows.

    Args:
        rows: (N, channels). All tensors are on the CPU, and float32 unless they are indices; see `library.fit`.
        packed: of as many groups as `counts` has; see `PackedWeights`.
        bias: (groups, outputs), or None.
        outputs: columns of the answer.
        counts: rows of the answer in each group, one group after the other; M together.
        around: (M, taps) rows of `rows` that make one row of the left matrix, below 0 for zeros; None: all in order.
        relu: apply a ReLU.

    Returns:
        (M, outputs).
    """
    return torch.ops.dynanet.product(rows, packed, bias, outputs, counts, around, relu)


def product_add_(
    answer: Tensor,
    rows: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    *,
    counts: Sequence[int],
    to: Tensor,
    around: Tensor | None = None,
    relu: bool = False,
    scale: Tensor | None = None,
) -> None:
    """Compute answer[to[i]] += scale[i] * (row i of the product); arguments not listed are those of `product`.

    Args:
        answer: (places, outputs), contiguous; changed.
        rows: see `product`.
        packed: see `product`.
        bias: see `product`.
        counts: see `product`.
        to: (M,), places; one may come several times.
        around: see `product`.
        relu: apply a ReLU before scaling.
        scale: (M,), or None for 1.
    """
    torch.ops.dynanet.product_add_(answer, rows, packed, bias, counts, around, relu, to, scale)


def _product(rows: Tensor, packed: Tensor, bias: Any, outputs: int, counts: list[int], *rest: Any) -> Tensor:
    answer = rows.new_empty(sum(counts), outputs)
    _call(answer, rows, packed, bias, counts, *rest)
    return answer


def _call(
    answer: Tensor,
    rows: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    counts: list[int],
    around: Tensor | None,
    relu: bool,
    to: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    kernels = chosen()
    m = sum(counts)
    outputs = answer.shape[1]
    channels = rows.shape[1]
    taps = 1 if around is None else around.shape[1]
    assert kernels is not None
    if m == 0:
        return
    rows = rows.contiguous()
    check_floats(answer, rows, packed, bias, scale)
    fit = all(t is None or (t.dtype is torch.int64 and t.is_cpu and t.is_contiguous()) for t in (around, to))
    must(fit, "indices that are not int64 on the CPU, in one piece")
    shape = (len(counts), -(-outputs // kernels.wide), taps * channels, kernels.wide)
    must(packed.shape == shape, f"packed weights of shape {tuple(packed.shape)} in place of {shape}")
    must(bias is None or bias.shape == (len(counts), outputs), "a bias of another shape")
    must((rows.shape[0] >= m if around is None else around.shape[0] == m) and 1 <= taps <= TAPS, "too few rows")
    fit = (to is None or to.shape == (m,)) and (scale is None or scale.shape == (m,)) and min(counts) >= 0
    must(fit, "places, scales or counts of other rows")
    nothing = None if around is None else rows.new_zeros(channels)
    inside = kernels.product(
        len(counts), (ctypes.c_int64 * len(counts))(*counts), outputs, taps, channels, rows.shape[0], rows.data_ptr(),
        address(around), address(nothing), packed.data_ptr(), address(bias), address(scale), answer.shape[0],
        address(to), relu, to is not None, answer.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    must(inside, "an index outside the rows, or outside the places")


def _panels(weights: Sequence[Tensor], kernels: Kernels) -> Tensor:
    """(groups, panels, depth, wide): of a convolution, depth runs over positions first and channels last."""
    outputs = weights[0].shape[0]
    depth = weights[0][0].numel()
    wide = kernels.wide
    room = kernels.room(len(weights), -(-outputs // wide), depth, wide)
    with torch.no_grad():
        for weight, panels in zip(weights, room, strict=True):
            flat = (weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight).flatten(1)
            padded = functional.pad(flat, (0, 0, 0, -outputs % wide))
            panels.copy_(padded.unflatten(0, (-1, wide)).transpose(1, 2))
    return room


_LIBRARY.impl("product", _product, "CPU")
_LIBRARY.impl("product_add_", _call, "CPU")
_LIBRARY.impl(
    "product", lambda rows, packed, bias, outputs, counts, *rest: rows.new_empty(sum(counts), outputs), "Meta"
)
_LIBRARY.impl("product_add_", lambda answer, *rest: None, "Meta")


@register_flop_formula(torch.ops.dynanet.product, get_raw=True)
def _flops(rows: Tensor, packed: Tensor, bias: Any, outputs: int, counts: list[int], *_: Any, **__: Any) -> int:
    """As torch counts: two for a multiply-accumulate. Padding of the last panel is not counted."""
    return 2 * sum(counts) * packed.shape[2] * outputs


@register_flop_formula(torch.ops.dynanet.product_add_, get_raw=True)
def _add_flops(answer: Tensor, rows: Tensor, packed: Tensor, bias: Any, counts: list[int], *_: Any, **__: Any) -> int:
    return _flops(rows, packed, bias, answer.shape[1], counts)
