"""Rows are square tiles of an image of any size; a unit may read a halo around them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import StructureError
from dynanet.core.rows import Rows, over_tensors
from dynanet.ops.native.chains import Chain, LayerRun, Ready, fused, runs
from dynanet.ops.native.pixels import channels_last, convolutions, copied


class Tiles(Rows):
    """Tiles of (B, C, H, W) tensors, lead (B, tiles down, tiles across).

    A unit is a convolution, or an nn.Sequential of stride-1 "same" convolutions and position-wise layers. On a tile
    it must see what it would see in the image: the halo is read from the image, positions outside the image are zero
    before *every* padded convolution, and tiles at the edge have full size.

    Args:
        tile: side of a tile, in positions; 1 makes every position a row.
        halo: how far a unit reads beyond its tile on each side: the sum of its convolutions' paddings, or more.

    Raises:
        StructureError: a tile below 1 or a halo below 0.
    """

    def __init__(self, tile: int, halo: int = 0) -> None:
        if tile < 1 or halo < 0:
            raise StructureError(f"tiles need a side of at least 1 and a halo of at least 0; got {tile} and {halo}")
        self.tile, self.halo = tile, halo

    def grid(self, x_BCHW: Tensor) -> tuple[int, int, int]:
        """The lead shape for an image batch."""
        return x_BCHW.shape[0], ceil(x_BCHW.shape[2] / self.tile), ceil(x_BCHW.shape[3] / self.tile)

    def check_mask(self, per_tile: Tensor, x_BCHW: Tensor) -> None:
        """Refuse what says another number of tiles than an image has: it would be cut, or spread over wrong positions.

        Args:
            per_tile: (B, tiles down, tiles across, ...), scores or a mask.
            x_BCHW: the images.

        Raises:
            StructureError: another size.
        """
        _, *tiles = self.grid(x_BCHW)
        if per_tile.dim() < 3 or list(per_tile.shape[1:3]) != tiles:
            raise StructureError(
                f"a mask or scores of shape {tuple(per_tile.shape)} came for images of {tuple(x_BCHW.shape[2:])} in "
                f"tiles of {self.tile}; expected {tiles[0]} x {tiles[1]} after the batch, one for every tile"
            )

    def check(self, unit: nn.Module) -> None:
        """Refuse a unit that tiles cannot run.

        Raises:
            StructureError: a layer that reads neighbours in another way than a stride-1 same convolution, a dynamic
                layer inside, or a halo that is too small.
        """
        reads = 0
        for layer in _chain(unit):
            if isinstance(layer, nn.Conv2d):
                if layer.stride != (1, 1) or any(2 * p != d * (k - 1) for p, d, k in _geometry(layer)):
                    raise StructureError(f"a unit on tiles needs stride-1 'same' convolutions; got {layer}")
                if layer.padding_mode != "zeros" or len(set(_padding(layer))) > 1:
                    raise StructureError(f"a unit on tiles needs square kernels with zero padding; got {layer}")
                reads += _padding(layer)[0]
            elif isinstance(layer, Dynamic):
                raise StructureError(
                    f"{type(layer).__name__} lies inside a spatial unit, where a row would belong to its tile and to "
                    f"the halos around it; put it around the spatial layer instead"
                )
            elif not isinstance(layer, _POSITION_WISE):
                raise StructureError(
                    f"{type(layer).__name__} cannot run on tiles: a unit is a Sequential of stride-1 'same' "
                    f"convolutions, batch norms and activations"
                )
        if reads > self.halo:
            raise StructureError(
                f"this unit reads {reads} positions beyond a tile but the halo is {self.halo}; raise it"
            )

    def whole(self, x: Any, lead: tuple[int, ...]) -> Any:
        """The images as they are."""
        return x

    def take(self, x: Any, lead: tuple[int, ...], index: Tensor) -> Any:
        """(tiles with halo (r, C, t + 2h, t + 2h), inside (r, 1, t + 2h, t + 2h)): 0 outside the image."""
        tile, halo, (_, down, across) = self.tile, self.halo, lead
        height, width = x.shape[2:]
        sample, row, column = index // (down * across), index // across % down, index % across
        span = torch.arange(-halo, tile + halo, device=x.device)
        rows, columns = row[:, None] * tile + span, column[:, None] * tile + span
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        # Gathered as channels-last rows: one contiguous copy per position instead of one per channel.
        patches = x.permute(0, 2, 3, 1)[
            sample[:, None, None], rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
        ]
        return patches.permute(0, 3, 1, 2), inside[:, None].to(x.dtype)

    def call(self, unit: Callable, x: Any) -> Any:
        """Run the unit on tiles: every padded convolution eats its padding off the halo."""
        tiles, inside = x
        assert isinstance(unit, nn.Module), "a unit on tiles is a module, so that its convolutions can be seen"
        for layer in _chain(unit):
            padding = _padding(layer)[0] if isinstance(layer, nn.Conv2d) else 0
            if padding:
                assert isinstance(layer, nn.Conv2d)
                tiles = nn.functional.conv2d(
                    tiles * inside, layer.weight, layer.bias, 1, 0, layer.dilation, layer.groups
                )
                inside = inside[..., padding:-padding, padding:-padding]
            else:
                tiles = layer(tiles)
        spare = (tiles.shape[-1] - self.tile) // 2
        return tiles[..., spare : spare + self.tile, spare : spare + self.tile]

    def put(self, y: Any, lead: tuple[int, ...], index: Tensor, otherwise: Any) -> Any:
        """`otherwise` with the tiles at `index` replaced."""
        tile, (batch, down, across) = self.tile, lead

        def home(t: Tensor, o: Tensor) -> Tensor:
            height, width = o.shape[2:]
            padded = nn.functional.pad(o, (0, across * tile - width, 0, down * tile - height))
            tiles = padded.reshape(batch, o.shape[1], down, tile, across, tile).permute(0, 2, 4, 1, 3, 5).clone()
            tiles[index // (down * across), index // across % down, index % across] = t
            image = tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, o.shape[1], down * tile, across * tile)
            return image[..., :height, :width]

        return over_tensors(home, y, otherwise)

    def mask(self, y: Any, lead: tuple[int, ...], keep: Tensor, otherwise: Any) -> Any:
        """The blend, every position with its tile's keep."""

        def blend(t: Tensor, o: Tensor) -> Tensor:
            k = self.spread(keep.reshape(lead), t)
            return k * t + (1 - k) * o

        return over_tensors(blend, y, otherwise)

    def spread(self, per_tile: Tensor, like: Tensor) -> Tensor:
        """(B, tiles down, tiles across) to (B, 1, H, W): every position gets its tile's value."""
        if self.tile == 1:
            return per_tile[:, None].to(like.dtype)
        wide = per_tile[:, None, :, None, :, None].expand(-1, -1, -1, self.tile, -1, self.tile)
        wide = wide.flatten(4, 5).flatten(2, 3)
        return wide[..., : like.shape[2], : like.shape[3]].to(like.dtype)


class Compact:
    """A chain of stride-1 "same" convolutions at chosen positions: gathered once, computed as rows, put back once.

    The chain falls into parts; each but the first starts with a convolution that reads neighbours, so that a part is
    computed on one set of positions. Every part runs where the next one reads, so the answer is that of the image
    (Figurnov et al. 2017, arXiv:1612.02297, and Verelst and Tuytelaars 2020, arXiv:1912.03203: the mask dilated through
    3x3 convolutions). Unlike a tile's halo, nothing is computed twice; unlike a `region`, nothing is taken for zero.

    Args:
        unit: an nn.Sequential of stride-1 "same" convolutions and position-wise layers.

    Raises:
        StructureError: a unit that tiles cannot run.
    """

    def __init__(self, unit: nn.Module) -> None:
        Tiles(1, 2**30).check(unit)
        self._unit = unit
        self._layers: list[nn.Module] = []
        self._runs: dict[bool, list[LayerRun]] = {}
        self._native = Chain()
        self._refresh()

    def _refresh(self) -> None:
        """See the unit's layers as they are now: a session folds batch norms into the convolutions before them."""
        layers = _chain(self._unit)
        if layers == self._layers:
            return
        self._layers, self._runs, self.parts = layers, {}, _parts(layers)
        reads = [_padding(part[0])[0] if part and isinstance(part[0], nn.Conv2d) else 0 for part in self.parts]
        self.reach = [sum(reads[j + 1 :]) for j in range(len(reads))]

    @property
    def native(self) -> bool:
        """Native kernels can run the chain."""
        self._refresh()
        return self._native.ready(self._layers) is not None

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
        return otherwise if rows is None else _image(_flat(otherwise).index_copy(0, index, rows), otherwise)

    def add(self, layer: Dynamic, units: Sequence[int], keep_B1HW: Tensor, x: Tensor, *, owned: bool = False) -> Tensor:
        """x plus the chain's answer at the kept positions, x elsewhere; arguments as of `run`. What is `owned` may be
        overwritten.

        The sparse answer is laid out channels last: what gathers from it next need not copy the image.
        """
        if not layer.gathers:
            return x + keep_B1HW * self._dense(x)
        flat, packed = self._ready(x)
        if packed is not None and isinstance(fused(self.parts[-1])[-1][0], nn.Conv2d):
            # The last convolution may add to the very rows that the first has read, if nobody else has these.
            ours = (owned or flat.data_ptr() != x.data_ptr()) and len(packed) > 1
            answer = flat if ours else copied(flat)
            self._rows(layer, units, keep_B1HW, flat, packed, answer)
            return _image(answer, x)
        rows, index = self._sparse(layer, units, keep_B1HW, flat, packed)
        return x if rows is None else _image(flat.index_add(0, index, rows), x)

    def _ready(self, x: Tensor) -> tuple[Tensor, Ready | None]:
        """x as rows, and the packed weights if native kernels can run the chain as it is now."""
        self._refresh()
        flat = _flat(x)
        return flat, self._native.ready(self._layers, flat)

    def _sparse(
        self, layer: Dynamic, units: Sequence[int], keep_B1HW: Tensor, flat: Tensor, packed: Ready | None
    ) -> tuple[Tensor | None, Tensor]:
        """The chain's answer (n, C) at the kept positions, and which these are; None if there are none."""
        if packed is not None:
            last = layer.kept(keep_B1HW[:, 0])
            assert last.index is not None
            return None if last.empty else self._rows(layer, units, keep_B1HW, flat, packed), last.index
        kept = [layer.kept(at) for at in self.sets(keep_B1HW)]
        places = [k.index for k in kept if k.index is not None]
        if kept[-1].empty:
            return None, places[-1]
        rows = flat.index_select(0, places[0])
        for j, part in enumerate(self.parts):
            with layer.within(kept[j].frame(layer, units[j])):
                for i, step in enumerate(part):
                    if isinstance(step, nn.Conv2d):
                        reads = j > 0 and i == 0
                        around = _neighbours(step, places[j - 1], places[j], keep_B1HW) if reads else None
                        rows = _convolve(step, rows, around)
                    else:
                        rows = step(rows[:, :, None, None])[:, :, 0, 0]
        return rows, places[-1]

    def _rows(
        self,
        layer: Dynamic,
        units: Sequence[int],
        keep_B1HW: Tensor,
        flat: Tensor,
        packed: Ready,
        into: Tensor | None = None,
    ) -> Tensor:
        """The chain's answer (n, C) at the kept positions, natively: rows are read where they lie, never gathered or
        laid side by side. With `into`, the last convolution adds its answer to these rows of images.
        """
        before: int | None = None  # `rows` are those within so many positions of a kept one; None: all
        rows, apart = flat, layer.trace is not None
        if apart not in self._runs:
            self._runs[apart] = runs(self.parts, self.reach, apart=apart)
        for run in self._runs[apart]:
            with self._within(layer, units[run.part], keep_B1HW, self.reach[run.part]):
                if run.convolutions:
                    answer = into if run is self._runs[apart][-1] else None
                    rows = convolutions(rows, run.convolutions, packed, keep_B1HW, before, answer)
                else:
                    assert run.other is not None
                    if before is None:
                        rows = flat[_dilate(keep_B1HW, run.reach).flatten() != 0]
                    rows = run.other(rows[:, :, None, None])[:, :, 0, 0]
            before = run.reach
        return rows

    def _within(self, layer: Dynamic, unit: int, keep_B1HW: Tensor, reach: int) -> AbstractContextManager[None]:
        """The frame of a part, for the trace; where there is none, nobody asks which rows these are."""
        if layer.trace is None:
            return nullcontext()
        return layer.within(layer.kept(_dilate(keep_B1HW, reach)[:, 0]).frame(layer, unit))

    def _dense(self, x: Tensor) -> Tensor:
        self._refresh()
        for part in self.parts:
            for step in part:
                x = step(x)
        return x


_POSITION_WISE = (
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Identity,
)


def _chain(unit: nn.Module) -> list[nn.Module]:
    if isinstance(unit, nn.Sequential):
        return [layer for child in unit for layer in _chain(child)]
    return [unit]


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if layer.padding == "valid":
        return 0, 0
    if isinstance(layer.padding, str):
        return tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return layer.padding


def _geometry(layer: nn.Conv2d) -> list[tuple[int, int, int]]:
    return list(zip(_padding(layer), layer.dilation, layer.kernel_size, strict=True))


def _parts(layers: list[nn.Module]) -> list[list[nn.Module]]:
    """The layers of a chain, cut before every convolution that reads neighbours."""
    parts: list[list[nn.Module]] = [[]]
    for layer in layers:
        if isinstance(layer, nn.Conv2d) and _padding(layer)[0]:
            parts.append([])
        if not isinstance(layer, nn.Identity):
            parts[-1].append(layer)
    return parts


def _flat(x_BCHW: Tensor) -> Tensor:
    """(B * H * W, C), in one piece: a view where x is laid out channels last, else a copy."""
    return channels_last(x_BCHW).permute(0, 2, 3, 1).flatten(0, 2).contiguous()


def _image(flat: Tensor, like_BCHW: Tensor) -> Tensor:
    batch, channels, height, width = like_BCHW.shape
    return flat.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def _dilate(keep_B1HW: Tensor, reach: int) -> Tensor:
    """Every position takes the largest keep in reach."""
    return nn.functional.max_pool2d(keep_B1HW, 2 * reach + 1, 1, reach) if reach else keep_B1HW


def _neighbours(conv: nn.Conv2d, before: Tensor, after: Tensor, image_BCHW: Tensor) -> Tensor:
    """(n, k * k): for every position in `after`, the rows of `before` that its kernel reads; one past the last where
    there is none, beyond the image's edge or outside the set.
    """
    batch, _, height, width = image_BCHW.shape
    positions, nothing = batch * height * width, before.shape[0]
    row_of = torch.full((positions + 1,), nothing, device=before.device)
    row_of[before] = torch.arange(nothing, device=before.device)
    steps = [
        d * torch.arange(k, device=before.device) - p
        for p, d, k in zip(_padding(conv), conv.dilation, conv.kernel_size, strict=True)
    ]
    down = (after // width % height)[:, None, None] + steps[0][:, None]
    across = (after % width)[:, None, None] + steps[1]
    inside = (down >= 0) & (down < height) & (across >= 0) & (across < width)
    place = (after // (height * width))[:, None, None] * (height * width) + down * width + across
    return row_of[torch.where(inside, place, positions).flatten(1)]


def _convolve(conv: nn.Conv2d, rows: Tensor, around: Tensor | None) -> Tensor:
    """A convolution of rows (n, C) with the neighbours told; None for a 1x1."""
    if around is not None:
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[around]  # (n, k * k, C)
    else:
        rows = rows[:, None]
    if conv.groups == 1:
        return nn.functional.linear(rows.flatten(1), conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)
    patches = rows.transpose(1, 2).unflatten(2, conv.kernel_size)
    return nn.functional.conv2d(patches, conv.weight, conv.bias, groups=conv.groups)[:, :, 0, 0]
