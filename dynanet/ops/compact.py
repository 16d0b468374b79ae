"""Chains of convolutions at kept positions of an image, which read whatever lies around these."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.dynamic import Dynamic, Kept
from dynanet.core.rows import same_dtype
from dynanet.ops.native.chains import Chain, LayerRun, Ready, fused, runs
from dynanet.ops.native.pixels import channels_last, convolutions, copied
from dynanet.ops.positions import Places, PositionChain, neighbours, padding, row_numbers


class Compact:
    """A chain of stride-1 "same" convolutions at kept positions: gathered once, computed as rows, scattered once.

    Every part of the chain (see `PositionChain`) runs where the next one reads, so the answer is that of the image
    (Figurnov et al. 2017, arXiv:1612.02297, and Verelst and Tuytelaars 2020, arXiv:1912.03203: the mask dilated through
    3x3 convolutions). Unlike with a tile's halo, nothing is computed twice; unlike in a `region`, nothing is taken for
    zero.

    Args:
        unit: an nn.Sequential of stride-1 "same" convolutions and position-wise layers.

    Attributes:
        parts: of the chain.
        reach: how far from a kept position each part runs.

    Raises:
        StructureError: a unit that cannot run on positions.
    """

    def __init__(self, unit: nn.Module) -> None:
        self._chain = PositionChain(unit)
        self._native = Chain()
        self._set_parts()

    @property
    def native(self) -> bool:
        """Whether native kernels can run the chain."""
        self._refresh()
        return self._native.ready(self._chain.layers) is not None

    def sets(self, keep_B1HW: Tensor) -> list[Tensor]:
        """Where each part runs, (B, H, W): the last at the kept positions."""
        return [_dilate(keep_B1HW, reach)[:, 0] for reach in self.reach]

    def run(self, layer: Dynamic, units: Sequence[int], keep_B1HW: Tensor, x: Tensor, otherwise: Tensor) -> Tensor:
        """The chain at the kept positions, `otherwise` elsewhere; as `Dynamic.run`.

        Args:
            layer: whose units these are.
            units: the unit that each part belongs to.
            keep_B1HW: 1 at the positions where the chain's answer is wanted.
            x: images (B, C, H, W).
            otherwise: shaped as the answer.
        """
        if not layer.gathers:
            return keep_B1HW * self._dense(x) + (1 - keep_B1HW) * otherwise
        rows, index = self._sparse(layer, units, keep_B1HW, *self._ready(x))
        if rows is None:
            return otherwise
        rows, image = same_dtype(rows, _flat(otherwise))
        return _image(image.index_copy(0, index, rows), otherwise)

    def add(self, layer: Dynamic, units: Sequence[int], keep_B1HW: Tensor, x: Tensor, *, owned: bool = False) -> Tensor:
        """Add the chain's answer to x at the kept positions; arguments as of `run`.

        The sparse answer is laid out channels last: what gathers from it next need not copy the image. With `owned`,
        x may be overwritten.
        """
        if not layer.gathers:
            return x + keep_B1HW * self._dense(x)
        flat, packed = self._ready(x)
        if packed is not None and isinstance(fused(self.parts[-1])[-1][0], nn.Conv2d):
            # The last convolution may add to the very rows that the first has read, if nothing else uses these.
            in_place = (owned or flat.data_ptr() != x.data_ptr()) and len(packed) > 1
            answer = flat if in_place else copied(flat)
            self._rows(layer, units, keep_B1HW, flat, packed, answer)
            return _image(answer, x)
        rows, index = self._sparse(layer, units, keep_B1HW, flat, packed)
        if rows is None:
            return x
        rows, flat = same_dtype(rows, flat)
        return _image(flat.index_add(0, index, rows), x)

    def _refresh(self) -> None:
        if self._chain.refresh():
            self._set_parts()

    def _set_parts(self) -> None:
        self.parts = self._chain.parts
        reads = [padding(part[0])[0] if part else 0 for part in self.parts]
        self.reach = [sum(reads[j + 1 :]) for j in range(len(reads))]
        self._runs: dict[bool, list[LayerRun]] = {}

    def _dense(self, x: Tensor) -> Tensor:
        self._refresh()
        return self._chain.dense(x)

    def _ready(self, x: Tensor) -> tuple[Tensor, Ready | None]:
        """The rows of x, and the packed weights if native kernels can run the chain as it is now."""
        self._refresh()
        flat = _flat(x)
        return flat, self._native.ready(self._chain.layers, flat)

    def _sparse(
        self, layer: Dynamic, units: Sequence[int], keep_B1HW: Tensor, flat: Tensor, packed: Ready | None
    ) -> tuple[Tensor | None, Tensor]:
        """The chain's answer (n, C) at the kept positions, and which these are; None if there are none."""
        if packed is not None:
            last = layer.kept(keep_B1HW[:, 0])
            assert last.index is not None
            return None if last.empty else self._rows(layer, units, keep_B1HW, flat, packed), last.index
        kept = [layer.kept(at) for at in self.sets(keep_B1HW)]
        places = _Dilated(layer, units, kept, keep_B1HW)
        return None if kept[-1].empty else self._chain.rows(places, flat), places.index[-1]

    def _rows(
        self,
        layer: Dynamic,
        units: Sequence[int],
        keep_B1HW: Tensor,
        flat: Tensor,
        packed: Ready,
        into: Tensor | None = None,
    ) -> Tensor:
        """The chain's answer (n, C) at the kept positions, natively.

        Rows are read where they lie, never gathered or laid side by side. With `into`, the last convolution adds its
        answer to these rows of images.
        """
        before: int | None = None  # `rows` are those within this distance of a kept one; None: all
        rows = flat
        traced = layer.trace is not None
        if traced not in self._runs:
            self._runs[traced] = runs(self.parts, self.reach, apart=traced)
        for run in self._runs[traced]:
            with self._within(layer, units[run.part], keep_B1HW, self.reach[run.part]):
                if run.convolutions:
                    answer = into if run is self._runs[traced][-1] else None
                    rows = convolutions(rows, run.convolutions, packed, keep_B1HW, before, answer)
                else:
                    assert run.other is not None
                    if before is None:
                        rows = flat[_dilate(keep_B1HW, run.reach).flatten() != 0]
                    rows = run.other(rows[:, :, None, None])[:, :, 0, 0]
            before = run.reach
        return rows

    def _within(self, layer: Dynamic, unit: int, keep_B1HW: Tensor, reach: int) -> AbstractContextManager[None]:
        """The frame of a part, which only a trace needs."""
        if layer.trace is None:
            return nullcontext()
        return layer.within(layer.kept(_dilate(keep_B1HW, reach)[:, 0]).frame(layer, unit))


class _Dilated(Places):
    """Positions around kept ones, fewer from part to part. Images are given as rows (B * H * W, C)."""

    def __init__(self, layer: Dynamic, units: Sequence[int], kept: Sequence[Kept], keep_B1HW: Tensor) -> None:
        self.index = [k.index for k in kept if k.index is not None]
        self._layer = layer
        self._units = units
        self._kept = kept
        self._shape = (keep_B1HW.shape[0], keep_B1HW.shape[2], keep_B1HW.shape[3])

    def start(self, image: Tensor, *, everywhere: bool) -> Tensor:
        return image.index_select(0, self.index[0])

    def read(self, part: int, conv: nn.Conv2d, rows: Tensor, image: Tensor) -> Tensor:
        around = neighbours(self.index[part], self._shape, conv.kernel_size, conv.dilation)
        places = row_numbers(self.index[part - 1], len(image))[around].flatten()
        return functional.pad(rows, (0, 0, 0, 1)).index_select(0, places).view(len(around), -1)

    def within(self, part: int) -> AbstractContextManager[None]:
        return self._layer.within(self._kept[part].frame(self._layer, self._units[part]))


def _flat(x_BCHW: Tensor) -> Tensor:
    """(B * H * W, C), in one piece: a view where x is laid out channels last, else a copy."""
    return channels_last(x_BCHW).permute(0, 2, 3, 1).flatten(0, 2).contiguous()


def _image(flat: Tensor, like_BCHW: Tensor) -> Tensor:
    batch, channels, height, width = like_BCHW.shape
    return flat.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def _dilate(keep_B1HW: Tensor, reach: int) -> Tensor:
    """Every position takes the largest keep in reach."""
    return functional.max_pool2d(keep_B1HW, 2 * reach + 1, 1, reach) if reach else keep_B1HW
