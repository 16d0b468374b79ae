"""Scorers answer one score per row and unit, from what the layer sees."""

from torch import Tensor, nn


class PooledScorer(nn.Module):
    """Global average pool, then one hidden layer: the gate of ConvNet-AIG (Veit and Belongie 2018, arXiv:1711.11503).

    Args:
        channels: of the feature map (B, C, H, W).
        units: scores per sample.
        hidden: width of the hidden layer; 0 for a single linear map.
        bias: the last bias at the start. Positive: the unit is kept at first, so that training starts from the full
            model.
    """

    def __init__(self, channels: int, units: int = 1, hidden: int = 16, bias: float = 2.0):
        super().__init__()
        before = [nn.Linear(channels, hidden), nn.ReLU()] if hidden else []
        last = nn.Linear(hidden or channels, units)
        nn.init.constant_(last.bias, bias)
        self.map = nn.Sequential(*before, last) if before else last

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Scores (B, units)."""
        return self.map(x_BCHW.mean((2, 3)))


class TileScorer(nn.Module):
    """A 1x1 convolution, averaged over tiles: one score per tile.

    Args:
        channels: of the feature map (B, C, H, W).
        tile: side of a tile, in positions.
    """

    def __init__(self, channels: int, tile: int):
        super().__init__()
        self.map, self.tile = nn.Conv2d(channels, 1, 1), tile

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Scores (B, tiles down, tiles across, 1). Edge tiles average over the positions that exist."""
        return tile_mean(self.map(x_BCHW), self.tile)


def tile_mean(x_B1HW: Tensor, tile: int) -> Tensor:
    """Mean over tiles of any image size: (B, 1, H, W) to (B, tiles down, tiles across, 1)."""
    pooled = nn.functional.avg_pool2d(x_B1HW, tile, ceil_mode=True, count_include_pad=False)
    return pooled[:, 0, :, :, None]
