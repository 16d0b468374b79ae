"""Pixels as operators: images as rows, scores of positions, and convolutions at the positions of a mask.

Rows are positions, (B * H * W, C): images laid out channels last. Operators find out themselves which positions are
kept, and which of them a convolution reads.
"""

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from dynanet.core.plain import is_plain
from dynanet.ops.native.library import check_floats, chosen, fit, must
from dynanet.ops.native.products import TAPS

_LIBRARY = torch.library.Library("dynanet", "FRAGMENT")
_LIBRARY.define("channels_last(Tensor x) -> Tensor")
_LIBRARY.define("scores(Tensor x, Tensor around, Tensor bias, Tensor whole, int tile) -> Tensor")
_CONVOLUTIONS = "Tensor rows, Tensor keep, int before, Tensor[] packed, Tensor?[] biases, int[] sizes"
_LIBRARY.define(f"convolutions({_CONVOLUTIONS}) -> Tensor")
_LIBRARY.define(f"convolutions_add_(Tensor(a!) answer, {_CONVOLUTIONS}) -> ()")
_SIZES = 7


class Convolution(NamedTuple):
    """A convolution of stride 1 at chosen positions.

    Attributes:
        layer: of which the geometry is used.
        relu: apply a ReLU to its answer.
        reach: how far the positions may be from a kept one, down and across.
    """

    layer: nn.Conv2d
    relu: bool
    reach: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes in the order of the kernel's arguments."""
        return self.layer.out_channels, self.reach, self.relu, *self.layer.kernel_size, *self.layer.dilation


def channels_last(x: Tensor) -> Tensor:
    """Copy x to channels last; x itself where it already is, or where native kernels cannot copy it.

    Args:
        x: (B, C, H, W).
    """
    if x.is_contiguous(memory_format=torch.channels_last) or not x.is_contiguous() or not fit(x):
        return x
    return torch.ops.dynanet.channels_last(x)


def copied(rows: Tensor) -> Tensor:
    """Copy many rows into large pages; elsewhere new memory costs more than the copy."""
    kernels = chosen()
    assert kernels is not None
    return kernels.room(*rows.shape).copy_(rows)


def scores(x: Tensor, around: nn.Conv2d, whole: nn.Module, tile: int) -> Tensor | None:
    """Compute a 3x3 convolution to one channel, averaged over tiles, plus a linear map of the images' mean.

    Args:
        x: (B, C, H, W), laid out channels last.
        around: the convolution, with padding of 1 and a bias.
        whole: the linear map, a 1x1 convolution without bias.
        tile: side of a tile.

    Returns:
        (B, tiles down, tiles across, 1); None where native kernels cannot run it.
    """
    if not (is_plain(whole, nn.Conv2d) and is_plain(around, nn.Conv2d)):
        return None
    assert isinstance(whole, nn.Conv2d)
    if not fit(x, around.weight, around.bias, whole.weight):
        return None
    if not x.is_contiguous(memory_format=torch.channels_last) or not x.numel():
        return None
    assert around.bias is not None
    return torch.ops.dynanet.scores(x, around.weight, around.bias, whole.weight, tile)


def convolutions(
    rows: Tensor,
    steps: Sequence[Convolution],
    packed: Mapping[nn.Module, tuple[Tensor, Tensor | None]],
    keep: Tensor,
    before: int | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Run convolutions one after the other, each within its reach of the kept positions.

    Args:
        rows: (n, channels): all positions of the images, or those within `before` of a kept one, in order.
        steps: "same" convolutions, each with the reach of the one before it, less its own padding.
        packed: weights and biases, see `products.PackedWeights`.
        keep: (B, 1, H, W), not 0 at the positions that are kept.
        before: see `rows`; None: all positions.
        into: (positions, outputs), contiguous: the answer is added there and not returned.

    Returns:
        (m, outputs), in the order of positions; `into` if it is given.
    """
    weights, biases = zip(*(packed[step.layer] for step in steps), strict=True)
    sizes = [size for step in steps for size in step.sizes]
    where = rows, keep, -1 if before is None else before, weights, biases, sizes
    if into is None:
        return torch.ops.dynanet.convolutions(*where)
    torch.ops.dynanet.convolutions_add_(into, *where)
    return into


def _channels_last(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    kernels = chosen()
    assert kernels is not None
    check_floats(x)
    answer = kernels.room(batch, height, width, channels).permute(0, 3, 1, 2)
    kernels.rows(batch, channels, height * width, x.data_ptr(), answer.data_ptr(), torch.get_num_threads())
    return answer


def _scores(x: Tensor, around: Tensor, bias: Tensor, whole: Tensor, tile: int) -> Tensor:
    kernels = chosen()
    batch, channels, height, width = x.shape
    around = around.contiguous()
    whole = whole.contiguous()
    answer = x.new_empty(batch, -(-height // tile), -(-width // tile), 1)
    padded, wide = (-(-size // 16) * 16 for size in (channels, width))
    room = x.new_empty(9 * padded + batch * height * (padded + 9 * wide))
    assert kernels is not None
    check_floats(x.permute(0, 2, 3, 1), around, bias, whole)
    must(x.numel() > 0, "no images")
    must(around.numel() == 9 * channels and whole.numel() == channels and tile > 0, "weights of another shape")
    kernels.scores(
        batch, height, width, channels, tile, x.data_ptr(), around.data_ptr(), whole.data_ptr(), bias.item(),
        room.data_ptr(), answer.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return answer


def _convolutions(rows: Tensor, keep: Tensor, *rest: Any) -> Tensor:
    *_, sizes = rest
    answer = rows.new_empty(keep.numel(), sizes[-_SIZES])
    return answer[: _run(answer, rows, keep, *rest, add=False)]


def _convolutions_add_(answer: Tensor, rows: Tensor, keep: Tensor, *rest: Any) -> None:
    *_, sizes = rest
    must(answer.shape == (keep.numel(), sizes[-_SIZES]), "places of another size")
    _run(answer, rows, keep, *rest, add=True)


def _run(
    answer: Tensor,
    rows: Tensor,
    keep: Tensor,
    before: int,
    packed: list[Tensor],
    biases: list[Tensor | None],
    sizes: list[int],
    *,
    add: bool,
) -> int:
    kernels = chosen()
    rows = rows.contiguous()
    keep = keep.contiguous()
    positions = keep.numel()
    assert kernels is not None
    check_floats(answer, rows, keep, *packed, *biases)
    depth = rows.shape[1]  # channels that a convolution reads
    widest = 1  # most of them
    most = 1  # most taps
    for i, (weight, bias) in enumerate(zip(packed, biases, strict=True)):
        outputs, reach, _, down, across, *dilation = sizes[_SIZES * i : _SIZES * (i + 1)]
        shape = (1, -(-outputs // kernels.wide), down * across * depth, kernels.wide)
        must(weight.shape == shape, f"packed weights of shape {tuple(weight.shape)} in place of {shape}")
        must(bias is None or bias.shape == (1, outputs), "a bias of another shape")
        must(1 <= down * across <= TAPS and min(dilation) > 0 <= reach, "a kernel or a reach of no size")
        widest = max(widest, depth)
        most = max(most, down * across)
        depth = outputs
    several = len(packed)
    height, width = keep.shape[-2:]
    # Room for all positions; what is not kept is never touched, and costs nothing.
    spare = kernels.room(min(several - 1, 2), positions * widest)
    room = torch.empty(positions * (2 + most) + positions // 8 + 1, dtype=torch.int64)
    zeros = rows.new_zeros(widest)
    first = spare.data_ptr()
    n = kernels.convolutions(
        positions // max(1, height * width), height, width, keep.data_ptr(), before, *rows.shape, rows.data_ptr(),
        several, (ctypes.c_int64 * len(sizes))(*sizes), _addresses(packed), _addresses(biases), zeros.data_ptr(),
        (ctypes.c_void_p * 2)(first, first + 4 * positions * widest), room[positions * (2 + most) :].data_ptr(),
        room.data_ptr(), add, answer.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    must(n >= 0, f"{rows.shape[0]} rows, which are not those of the positions, or a kernel that reads beyond them")
    return n


def _addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


_LIBRARY.impl("channels_last", _channels_last, "CPU")
_LIBRARY.impl("scores", _scores, "CPU")
_LIBRARY.impl("convolutions", _convolutions, "CPU")
_LIBRARY.impl("convolutions_add_", _convolutions_add_, "CPU")
_LIBRARY.impl("channels_last", lambda x: torch.empty_like(x, memory_format=torch.channels_last), "Meta")
_LIBRARY.impl(
    "scores",
    lambda x, around, bias, whole, tile: x.new_empty(x.shape[0], -(-x.shape[2] // tile), -(-x.shape[3] // tile), 1),
    "Meta",
)
_LIBRARY.impl("convolutions_add_", lambda answer, *rest: None, "Meta")


@register_flop_formula(torch.ops.dynanet.scores, get_raw=True)
def _scores_flops(x: Tensor, *_: Any, **__: Any) -> int:
    """As torch counts: two for a multiply-accumulate; nine per position and channel, one per image and channel."""
    return 2 * (9 * x.numel() + math.prod(x.shape[:2]))


@register_flop_formula(torch.ops.dynanet.convolutions, get_raw=True)
def _flops(rows: Tensor, keep: Tensor, before: int, packed: Any, biases: Any, sizes: list[int], **_: Any) -> int:
    """Of the positions where each convolution runs. Padding of the last panel is not counted."""
    total = 0
    for weight, outputs, reach in zip(packed, sizes[::_SIZES], sizes[1::_SIZES], strict=True):
        near = nn.functional.max_pool2d((keep != 0).to(keep.dtype), 2 * reach + 1, 1, reach)
        total += 2 * int(near.count_nonzero()) * weight.shape[2] * outputs
    return total


@register_flop_formula(torch.ops.dynanet.convolutions_add_, get_raw=True)
def _add_flops(answer: Tensor, *where: Any, **_: Any) -> int:
    return _flops(*where)
