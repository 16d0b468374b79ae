"""Scorers map the input of a layer to one score per row and unit."""

from torch import Tensor, nn

from dynanet.core.errors import check_sizes
from dynanet.core.plain import is_plain
from dynanet.ops.native.library import fit
from dynanet.ops.native.pixels import scores
from dynanet.ops.tiles import tile_mean


class PooledScorer(nn.Module):
    """Global average pool, then one hidden layer: the gate of ConvNet-AIG (Veit and Belongie 2018, arXiv:1711.11503).

    Args:
        channels: of the feature map (B, C, H, W).
        units: scores per sample.
        hidden: width of the hidden layer; 0 for a single linear map.
        bias: initial bias of the last layer. Positive: units are kept at first, so that training starts from the full
            model.
        norm: normalise scores over the training data before the bias is added. Pooled maps differ little from input to
            input, so that a gate trained under a budget tends to end always open or always closed; with a norm it
            separates inputs from the first step on.

    Raises:
        ConfigError: sizes below 1, or a negative `hidden`.
    """

    def __init__(
        self, channels: int, units: int = 1, hidden: int = 16, bias: float = 2.0, *, norm: bool = False
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, units=units, hidden=hidden or 1)
        before = [nn.Linear(channels, hidden), nn.ReLU()] if hidden else []
        last = nn.Linear(hidden or channels, units)
        nn.init.constant_(last.bias, bias)
        self.map: nn.Module = nn.Sequential(*before, last) if before else last
        self.norm = nn.BatchNorm1d(units) if norm else None
        if self.norm is not None:
            nn.init.zeros_(last.bias)
            nn.init.constant_(self.norm.bias, bias)
            self.norm.weight.requires_grad_(False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Scores (B, units)."""
        score = self.map(x_BCHW.mean((2, 3)))
        return score if self.norm is None else self.norm(score)


class TileScorer(nn.Module):
    """A 1x1 convolution averaged over tiles: one score per tile.

    Args:
        channels: of the feature map (B, C, H, W).
        tile: side of a tile, in positions.
    """

    def __init__(self, channels: int, tile: int) -> None:
        super().__init__()
        self.map = nn.Conv2d(channels, 1, 1)
        self.tile = tile

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Scores (B, tiles down, tiles across, 1). Tiles at an edge average over the positions that exist."""
        return tile_mean(self.map(x_BCHW), self.tile)


class ContextScorer(nn.Module):
    """A 3x3 convolution plus a linear map of the mean over the whole image.

    The mask unit of DynConv (Verelst and Tuytelaars 2020, arXiv:1912.03203) and, with `norm` and a bias of -3, the
    halting score of SACT (Figurnov et al. 2017, arXiv:1612.02297).

    Args:
        channels: of the feature map (B, C, H, W).
        tile: side of a tile, in positions; its score is the mean over its positions. 1: a score per position.
        bias: initial bias. Positive: units are kept at first.
        norm: normalise both inputs first, as SACT does.

    Attributes:
        local: the convolution, (B, C, H, W) to (B, 1, H, W).
    """

    def __init__(self, channels: int, tile: int = 1, *, bias: float = 2.0, norm: bool = False) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, 1, 3, padding=1)
        assert conv.bias is not None
        nn.init.constant_(conv.bias, bias)
        self.local = nn.Sequential(nn.BatchNorm2d(channels), conv) if norm else nn.Sequential(conv)
        self.norm: nn.Module = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.context = nn.Conv2d(channels, 1, 1, bias=False)
        self.tile = tile

    @property
    def native(self) -> bool:
        """Whether native kernels can score: without a norm, and where no gradient is needed."""
        return len(self.local) == 1 and fit(*self.parameters())

    def overall(self, x_BCHW: Tensor) -> Tensor:
        """The part of every score that depends on the whole image, (B, 1, 1, 1)."""
        return self.context(self.norm(x_BCHW.mean((2, 3), keepdim=True)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Scores (B, tiles down, tiles across, 1)."""
        *before, conv = self.local
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        if not before and (native := scores(x_BCHW, conv, self.context, self.tile)) is not None:
            return native
        x = before[0](x_BCHW) if before else x_BCHW
        if not is_plain(conv, nn.Conv2d):
            return tile_mean(conv(x), self.tile) + self.overall(x_BCHW)
        # A 3x3 convolution to one channel reads x nine times. One matrix product gives the nine products of every
        # position instead, and `fold` sums them shifted: several times faster, in both memory layouts.
        products = conv.weight.flatten(2).flip(2)[0].t() @ x.flatten(2)
        local = nn.functional.fold(products, x.shape[2:], 3, padding=1) + conv.bias[:, None, None]
        return tile_mean(local, self.tile) + self.overall(x_BCHW)
