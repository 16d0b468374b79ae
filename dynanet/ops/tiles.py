"""Square tiles of an image as rows; a unit may read a halo around them."""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.errors import StructureError
from dynanet.core.plain import hooked
from dynanet.core.rows import Rows, over_tensors, same_dtype
from dynanet.ops.positions import check_unit, layers_of, padding


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
        self.tile = tile
        self.halo = halo

    def grid(self, x_BCHW: Tensor) -> tuple[int, int, int]:
        """The lead shape for an image batch."""
        return x_BCHW.shape[0], ceil(x_BCHW.shape[2] / self.tile), ceil(x_BCHW.shape[3] / self.tile)

    def check_mask(self, per_tile: Tensor, x_BCHW: Tensor) -> None:
        """Check that there is a value for every tile of the images.

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
        """Check that a unit can run on these tiles.

        Raises:
            StructureError: a layer that reads neighbours in another way than a stride-1 same convolution, a dynamic
                layer inside, or a halo that is too small.
        """
        reads = check_unit(unit)
        if reads > self.halo:
            raise StructureError(
                f"this unit reads {reads} positions beyond a tile but the halo is {self.halo}; raise it"
            )

    def whole(self, x: Any, lead: tuple[int, ...]) -> Any:
        """The images themselves."""
        return x

    def take(self, x: Any, lead: tuple[int, ...], index: Tensor) -> Any:
        """Gather tiles with their halo.

        Returns:
            (r, C, tile + 2 halo, tile + 2 halo), and a mask (r, 1, ...) of the same size, 0 outside the image.
        """
        tile = self.tile
        halo = self.halo
        height, width = x.shape[2:]
        sample, row, column = self._places(lead, index)
        span = torch.arange(-halo, tile + halo, device=x.device)
        rows, columns = row[:, None] * tile + span, column[:, None] * tile + span
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        # Gathered as channels-last rows: one contiguous copy per position instead of one per channel.
        patches = x.permute(0, 2, 3, 1)[
            sample[:, None, None], rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
        ]
        return patches.permute(0, 3, 1, 2), inside[:, None].to(x.dtype)

    def call(self, unit: Callable, x: Any) -> Any:
        """Run the unit on tiles: every padded convolution consumes its padding from the halo."""
        tiles, inside = x
        assert isinstance(unit, nn.Module), "a unit on tiles is a module, so that its convolutions can be seen"
        for layer in layers_of(unit):
            eaten = padding(layer)[0]
            if eaten and hooked(layer):
                tiles = layer(tiles * inside)[..., eaten:-eaten, eaten:-eaten]
                inside = inside[..., eaten:-eaten, eaten:-eaten]
            elif eaten:
                assert isinstance(layer, nn.Conv2d)
                tiles = nn.functional.conv2d(
                    tiles * inside, layer.weight, layer.bias, 1, 0, layer.dilation, layer.groups
                )
                inside = inside[..., eaten:-eaten, eaten:-eaten]
            else:
                tiles = layer(tiles)
        spare = (tiles.shape[-1] - self.tile) // 2
        return tiles[..., spare : spare + self.tile, spare : spare + self.tile]

    def put(self, y: Any, lead: tuple[int, ...], index: Tensor, otherwise: Any) -> Any:
        """`otherwise` with the tiles at `index` replaced."""
        tile = self.tile
        batch, down, across = lead

        def scattered(t: Tensor, o: Tensor) -> Tensor:
            t, o = same_dtype(t, o)
            height, width = o.shape[2:]
            padded = nn.functional.pad(o, (0, across * tile - width, 0, down * tile - height))
            tiles = padded.reshape(batch, o.shape[1], down, tile, across, tile).permute(0, 2, 4, 1, 3, 5).clone()
            tiles[self._places(lead, index)] = t
            image = tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, o.shape[1], down * tile, across * tile)
            return image[..., :height, :width]

        return over_tensors(scattered, y, otherwise)

    def mask(self, y: Any, lead: tuple[int, ...], keep: Tensor, otherwise: Any) -> Any:
        """The blend, every position with its tile's keep."""

        def blend(t: Tensor, o: Tensor) -> Tensor:
            k = self.spread(keep.reshape(lead), t)
            return k * t + (1 - k) * o

        return over_tensors(blend, y, otherwise)

    def spread(self, per_tile: Tensor, like: Tensor) -> Tensor:
        """Give every position its tile's value: (B, tiles down, tiles across) to (B, 1, H, W)."""
        if self.tile == 1:
            return per_tile[:, None].to(like.dtype)
        wide = per_tile[:, None, :, None, :, None].expand(-1, -1, -1, self.tile, -1, self.tile)
        wide = wide.flatten(4, 5).flatten(2, 3)
        return wide[..., : like.shape[2], : like.shape[3]].to(like.dtype)

    @staticmethod
    def _places(lead: tuple[int, ...], index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample, row and column of tiles."""
        _, down, across = lead
        return index // (down * across), index // across % down, index % across


def tile_mean(x_B1HW: Tensor, tile: int) -> Tensor:
    """Mean over tiles, (B, 1, H, W) to (B, tiles down, tiles across, 1), for images of any size."""
    pooled = x_B1HW if tile == 1 else nn.functional.avg_pool2d(x_B1HW, tile, ceil_mode=True, count_include_pad=False)
    return pooled[:, 0, :, :, None]
