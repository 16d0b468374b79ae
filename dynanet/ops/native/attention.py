"""Attention within the samples of packed rows as one operator, for any lengths; and the samples' means.

Queries, keys and values are read where they lie, for instance in columns of one matrix. Nothing is padded, and only the
scores of a few rows are held at a time.
"""

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynanet.ops.native.library import address, chosen, must

_LIBRARY = torch.library.Library("dynanet", "FRAGMENT")
_LIBRARY.define(
    "attend_packed(Tensor query, Tensor key, Tensor value, Tensor? bias, int[] lengths, int heads) -> Tensor"
)
_LIBRARY.define("mean_packed(Tensor x, int[] lengths) -> Tensor")
ATTEND_PACKED = torch.ops.dynanet.attend_packed.default  # the operator, for those who look for its calls

_BLOCK = 256
"""Most keys that are read together: transposed, they stay in the second level's cache."""


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, lengths: Sequence[int], heads: int
) -> Tensor:
    """Multi-head attention of every row to the rows of its sample.

    Args:
        query: (N, D), sample after sample. All tensors are float32 on the CPU; see `library.fit`.
        key: (N, D).
        value: (N, D).
        bias: (N,), added to the scores of a key in all heads; or None.
        lengths: rows of every sample, N together.
        heads: number of heads that D is split into.

    Returns:
        (N, D).
    """
    return torch.ops.dynanet.attend_packed(query, key, value, bias, lengths, heads)


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, lengths: list[int], heads: int
) -> Tensor:
    kernels = chosen()
    rows, width = query.shape
    assert kernels is not None
    there = (query, key, value) if bias is None else (query, key, value, bias)
    must(all(t.dtype is torch.float32 and t.is_cpu for t in there), "tensors that are not float32 on the CPU")
    must(key.shape == value.shape == query.shape, "queries, keys and values of different shapes")
    must(heads > 0 and width % heads == 0, f"{heads} heads of {width} features")
    must(sum(lengths) == rows and min(lengths, default=0) >= 0, "samples of other rows")
    must(bias is None or bias.shape == (rows,), "a bias of another shape")
    answer = query.new_empty(rows, width)
    if answer.numel() == 0:
        return answer
    of = [t if t.stride(1) == 1 else t.contiguous() for t in (query, key, value)]
    bias = None if bias is None else bias.contiguous()
    size = width // heads
    longest = max(lengths)
    threads = torch.get_num_threads()
    block = min(_BLOCK, -(-longest // 32) * 32)
    # Per key of a block its transposed key, its value where that is narrower than a vector, its bias, and a score in
    # every row of a tile; per row two numbers. A thread's room begins at a cache line.
    each = block * (size + (16 if size < 16 else 0) + 1 + 12) + -(-2 * longest // 16) * 16
    room = query.new_empty(threads * each)
    kernels.attend(
        len(lengths), _starts(lengths), heads, size,
        *(t.data_ptr() for t in of), *(t.stride(0) for t in of), address(bias),
        answer.data_ptr(), block, longest, each, room.data_ptr(), threads,
    )  # fmt: skip
    return answer


def mean_packed(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Average every sample's rows, (samples, D); NaN where a sample has none.

    Args:
        x: (N, D), sample after sample, float32 on the CPU; see `library.fit`.
        lengths: rows of every sample, N together.
    """
    return torch.ops.dynanet.mean_packed(x, lengths)


def _mean_packed(x: Tensor, lengths: list[int]) -> Tensor:
    kernels = chosen()
    rows, width = x.shape
    x = x.contiguous()
    assert kernels is not None
    must(x.dtype is torch.float32 and x.is_cpu, "a tensor that is not float32 on the CPU")
    must(sum(lengths) == rows and min(lengths, default=0) >= 0, "samples of other rows")
    answer = x.new_empty(len(lengths), width)
    kernels.means(len(lengths), _starts(lengths), width, x.data_ptr(), answer.data_ptr())
    return answer


def _starts(lengths: Sequence[int]) -> Any:
    """The first row of every sample, and the end of the last one."""
    return (ctypes.c_int64 * (len(lengths) + 1))(0, *accumulate(lengths))


_LIBRARY.impl("attend_packed", _attend_packed, "CPU")
_LIBRARY.impl("mean_packed", _mean_packed, "CPU")
_LIBRARY.impl("mean_packed", lambda x, lengths: x.new_empty(len(lengths), x.shape[1]), "Meta")
_LIBRARY.impl("attend_packed", lambda query, *rest: query.new_empty(query.shape), "Meta")


@register_flop_formula(torch.ops.dynanet.attend_packed, get_raw=True)
def _flops(query: Tensor, key: Tensor, value: Tensor, bias: Any, lengths: list[int], *_: Any, **__: Any) -> int:
    """As torch counts: two for a multiply-accumulate, of scores and of values."""
    return 4 * sum(n * n for n in lengths) * query.shape[1]
