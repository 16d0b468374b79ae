"""Choose a tile size: one branch on the same share of an image, cut into tiles of several sizes, timed on this device.

Coarse tiles run faster, fine ones match the image better. LASNet (Han et al. 2022, arXiv:2210.06223) chooses by a
latency model of the device; here it is measured.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.bench.timing import paired, ratio
from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import execute, record
from dynanet.core.errors import ConfigError, InputError
from dynanet.mechanisms.spatial_skip import SpatialSkip
from dynanet.ops.compact import Compact
from dynanet.ops.tiles import Tiles, tile_mean
from dynanet.session.session import Session


@dataclass(frozen=True)
class TileTime:
    """The time of a branch on tiles of one size.

    Attributes:
        tile: side of a tile, in positions.
        dilate: the mask is dilated from convolution to convolution; otherwise every tile brings a halo.
        macs: share of the dense branch's MACs that ran: for what is kept, and around it.
        ms: per image.
        faster: speed-up over the dense branch in its best engine, median of the rounds' ratios.
        low: their lower quartile.
        high: their upper quartile.
    """

    tile: int
    dilate: bool
    macs: float
    ms: float
    faster: float
    low: float
    high: float


@dataclass(frozen=True)
class TileTimes:
    """Results of `tile_times`; printed as a table.

    Attributes:
        keep: the share of tiles that ran the branch.
        dense_ms: per image, of the dense branch.
        rows: one per size and form, the fastest first.
    """

    keep: float
    dense_ms: float
    rows: tuple[TileTime, ...]

    def finest(self, slack: float = 0.1) -> TileTime | None:
        """Return the smallest tiles within a share of the best speed; None if all are slower than the dense branch.

        Args:
            slack: from 0, the fastest of any size, to below 1.

        Raises:
            ConfigError: a slack out of range.
        """
        if not 0 <= slack < 1:
            raise ConfigError(f"a slack of {slack}; expected a share of the best speed from 0 to below 1")
        best = self.rows[0].faster
        good = [row for row in self.rows if row.faster > 1 and row.faster >= (1 - slack) * best]
        return min(good, key=lambda row: (row.tile, -row.faster), default=None)

    def __str__(self) -> str:
        lines = [f"{'tile':>5} {'form':<8} {'MACs':>6} {'ms':>9} {'times faster':>13}  quartiles"]
        lines += [
            f"{row.tile:>5} {'dilated' if row.dilate else 'halos':<8} {row.macs:>6.0%} {row.ms:>9.3f} "
            f"{row.faster:>13.2f}  {row.low:.2f}-{row.high:.2f}"
            for row in self.rows
        ]
        return "\n".join([*lines, f"{'everywhere':<14} {1:>6.0%} {self.dense_ms:>9.3f} {1:>13.2f}"])


@torch.no_grad()
def tile_times(
    branch: nn.Module,
    example: Tensor,
    *,
    keep: float = 0.5,
    tiles: Sequence[int] = (1, 2, 4, 8, 16),
    scores: Tensor | None = None,
    rounds: int = 7,
    engines: str = "fastest",
    cache: Path | None = None,
) -> TileTimes:
    """Time the residual branch of a `SpatialSkip` at one share of the tiles, by their size, with halos and dilated.

    Every contestant runs as a session on torch's number of threads, interleaved (`paired`). The gate is not timed: its
    cost does not depend on the tiles.

    Args:
        branch: stride-1 same convolutions and position-wise layers, output shaped as the input.
        example: features (B, C, H, W) of the size and batch to expect.
        keep: share of every image's tiles that run, those with the highest scores, one at least; in (0, 1].
        tiles: sizes to try.
        scores: (B, H, W), for instance of a trained gate; a tile has its positions' mean. None: smooth noise, blobs of
            about 8 positions, as in real masks.
        rounds: of timing.
        engines: of the sessions.
        cache: of the sessions.

    Raises:
        ConfigError: a share, sizes or rounds out of range.
        InputError: an example that is not a batch of images, or scores of another size.
        StructureError: a branch that tiles cannot run.
    """
    if not 0 < keep <= 1 or not tiles or min(tiles) < 1 or rounds < 1:
        raise ConfigError(
            f"keep is {keep}, tiles {tuple(tiles)} and rounds {rounds}; expected a share above 0, and 1 or more each"
        )
    if example.dim() != 4 or not example.numel():
        raise InputError(f"an example of shape {tuple(example.shape)}; expected images (B, C, H, W), one or more")
    if scores is None:
        scores = _smooth_noise(example)
    if scores.shape != example.shape[:1] + example.shape[2:]:
        raise InputError(
            f"scores of shape {tuple(scores.shape)} for images of shape {tuple(example.shape)}; give (B, H, W)"
        )
    halo = Compact(branch).reach[0]
    layers = {
        (tile, dilate): SpatialSkip(
            copy.deepcopy(branch), _Fixed(scores, tile, keep), Tiles(tile, halo), dilate=dilate
        ).eval()
        for tile in sorted(set(tiles))
        for dilate in (False, True)
    }
    batch = example.shape[0]
    settings: dict[str, Any] = {"engines": engines, "batches": (1, batch), "cache": cache}
    sessions = {name: Session(layer, example, **settings) for name, layer in layers.items()}
    dense = Session(_Everywhere(copy.deepcopy(branch)).eval(), example, **settings)
    contestants: dict[Any, Callable[[], object]] = {"dense": lambda: dense(example)}
    for name, session in sessions.items():
        contestants[name] = partial(session, example)
    seconds = paired(contestants, rounds=rounds)
    rows = []
    for (tile, dilate), layer in layers.items():
        cost = CostModel(layer, example)
        with record(execute(layer, sparse=True)) as trace:
            layer(example)
        mine = seconds[tile, dilate]
        share = float(cost.spent(trace).mean()) / max(cost.full, 1.0)
        rows.append(TileTime(tile, dilate, share, _ms(mine, batch), *ratio(seconds["dense"], mine)))
    return TileTimes(keep, _ms(seconds["dense"], batch), tuple(sorted(rows, key=lambda row: -row.faster)))


class _Fixed(nn.Module):
    """A gate without weights that keeps every image's tiles with the highest scores."""

    def __init__(self, scores_BHW: Tensor, tile: int, keep: float) -> None:
        super().__init__()
        score = tile_mean(scores_BHW[:, None].float(), tile)
        flat = score.flatten(1)
        kept = max(1, round(keep * flat.shape[1]))
        self.keep: Tensor
        self.register_buffer("keep", torch.zeros_like(flat).scatter(1, flat.topk(kept, 1).indices, 1).view_as(score))

    def forward(self, x_BCHW: Tensor) -> Decision:
        keep = self.keep[: x_BCHW.shape[0]].to(x_BCHW.dtype)
        return Decision(keep, keep)


class _Everywhere(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _smooth_noise(example: Tensor) -> Tensor:
    """(B, H, W): blobs of about 8 positions, from a fixed seed."""
    height, width = example.shape[2:]
    draw = torch.Generator().manual_seed(0)
    coarse = torch.randn(example.shape[0], 1, -(-height // 8) + 1, -(-width // 8) + 1, generator=draw)
    return functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)[:, 0]


def _ms(seconds: np.ndarray, batch: int) -> float:
    return 1e3 * float(np.median(seconds)) / batch
