"""What every layer over positions does with images of any size and channels, all easy or all hard, and wrong masks."""

import pytest
import torch
from torch import nn

from dynanet import Decision, Gate, execute, forced, record
from dynanet.core.cost import CostModel
from dynanet.core.errors import StructureError
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import Gumbel, StraightThrough
from dynanet.gates.scorers import ContextScorer, TileScorer
from dynanet.mechanisms.pixel_cascade import PixelCascade
from dynanet.mechanisms.point_refine import PointHead, PointRefine
from dynanet.mechanisms.position_halting import PositionHalting
from dynanet.mechanisms.spatial_skip import SpatialSkip
from dynanet.ops.tiles import Tiles

# Channels, height, width: the first two are smaller than a tile, no stride and no tile divides the others.
IMAGES = [(1, 1, 1), (200, 3, 2), (200, 7, 13), (1, 17, 5)]


def branch(channels):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, channels, 1),
    )  # fmt: skip


def skip(channels, tile, *, dilate):
    gate = Gate(ContextScorer(channels, tile, bias=0.0), Gumbel()) if dilate else None
    gate = gate or Gate(TileScorer(channels, tile), StraightThrough())
    return SpatialSkip(branch(channels), gate, Tiles(tile, 1), dilate=dilate)


def halting(channels, tile, *, dilate):
    first = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if dilate else None
    heads = ContextScorer(channels, tile, bias=0.0) if dilate else TileScorer(channels, tile)
    cells = [branch(channels) for _ in range(2)]
    return PositionHalting(cells, heads, Tiles(tile, 1), eps=0.3, first=first, residual=dilate, dilate=dilate)


def cascade(channels, stride=4):
    backbone = nn.Sequential(nn.Conv2d(channels, 4, 3, stride=stride, padding=1), nn.ReLU())
    model = PixelCascade(backbone, [[branch(4)], [branch(4)]], [nn.Conv2d(4, 3, 1) for _ in range(3)])
    model.thresholds.fill_(0.3)
    return model


class Coarse(nn.Module):
    """Fine features, and logits at a quarter of the size."""

    def __init__(self, channels) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(channels, 4, 3, 2, 1), nn.Conv2d(4, 3, 3, 2, 1)

    def forward(self, x):
        fine = self.fine(x)
        return fine, self.coarse(fine)


LAYERS = {
    "spatial skip, tiles of 8": lambda channels: skip(channels, 8, dilate=False),
    "spatial skip, positions": lambda channels: skip(channels, 1, dilate=True),
    "spatial skip, dilated tiles of 8": lambda channels: skip(channels, 8, dilate=True),
    "position halting, tiles of 8": lambda channels: halting(channels, 8, dilate=False),
    "position halting, positions": lambda channels: halting(channels, 1, dilate=True),
    "pixel cascade": cascade,
    "point refinement": lambda channels: PointRefine(Coarse(channels), PointHead(4, 3, 8), points=5),
}


@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_any_size_and_channels(name, image):
    torch.manual_seed(0)
    model, x = LAYERS[name](image[0]).double().eval(), torch.randn(2, *image, dtype=torch.double)
    with record(execute(model, sparse=False)) as dense:
        expected = model(x)
    with record(execute(model, sparse=True)) as sparse:
        torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=0)
    assert bool(sparse.calls) == bool(dense.calls)
    for ours, theirs in zip(sparse.calls, dense.calls, strict=False):  # a sparse run may stop before the last ones
        assert torch.equal(ours.keep, theirs.keep)
    assert model(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("keep", [0.0, 1.0], ids=["all easy", "all hard"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_all_easy_and_all_hard(name, keep):
    torch.manual_seed(0)
    model, x = LAYERS[name](3).double().eval(), torch.randn(1, 3, 7, 13, dtype=torch.double)
    cost = CostModel(model, x)
    with forced(model, lambda decision: torch.full_like(decision.keep, keep)):
        expected = execute(model, sparse=False)(x)
        execute(model, sparse=True)
        with record(model) as trace, CountMacs(trace) as count:
            torch.testing.assert_close(model(x), expected, atol=1e-10, rtol=0)
    ran = sum(count.macs.values())
    assert ran == cost.spent(trace)
    assert ran == cost.worst if keep else ran < cost.worst


class Said(nn.Module):
    """Scores, or a decision, of this many tiles."""

    def __init__(self, tiles, *, decided) -> None:
        super().__init__()
        self.tiles, self.decided = tiles, decided

    def forward(self, x):
        said = torch.ones(x.shape[0], *self.tiles)
        return Decision(said, said) if self.decided else said


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("dilate", [False, True], ids=["halos", "dilated"])
@pytest.mark.parametrize("tiles", [(9, 10, 1), (2, 2, 1), (1, 1, 1), (3, 1), (1,)], ids=str)
def test_masks_of_another_size_are_refused(tiles, dilate, sparse):
    skips = SpatialSkip(branch(8), Said(tiles, decided=True), Tiles(4, 1), dilate=dilate)
    halts = PositionHalting([branch(8)] * 2, Said(tiles, decided=False), Tiles(4, 1), dilate=dilate)
    for model in (skips, halts):
        with pytest.raises(StructureError, match=r"images of \(9, 10\) in tiles of 4; expected 3 x 3"):
            execute(model.eval(), sparse=sparse)(torch.randn(2, 8, 9, 10))
