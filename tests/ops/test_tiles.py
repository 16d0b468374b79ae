import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynanet.core.errors import StructureError
from dynanet.core.gate import Gate
from dynanet.gates.rules import Threshold
from dynanet.gates.scorers import TileScorer
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.mechanisms.position_halting import PositionHalting
from dynanet.mechanisms.spatial_skip import SpatialSkip
from dynanet.ops.tiles import Tiles

C = 3
sides = st.integers(1, 11)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def conv(kernel=3, inside=C, outside=C, **how):
    return nn.Conv2d(inside, outside, kernel, padding="same", **how)


def norm(channels):
    """As after training: zero in is not zero out, so a mask that is missing shows at the image's edge."""
    layer = nn.BatchNorm2d(channels)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    layer.bias.data.normal_()
    return layer


def nested():
    return nn.Sequential(conv(1, C, 2), norm(2), nn.SiLU(), nn.Sequential(conv(3, 2, 2), conv(1, 2)))


UNITS = {  # how far each reads
    "1x1": (0, lambda: conv(1)),
    "3x3": (1, conv),
    "5x5, depthwise": (2, lambda: conv(5, groups=C)),
    "dilated": (2, lambda: conv(dilation=2)),
    "two convolutions and a norm": (2, lambda: nn.Sequential(conv(), norm(C), nn.ReLU(), conv())),
    "bottleneck": (1, nested),
}


def at_tiles(keep, tile, height, width):
    """(B, down, across) to (B, 1, H, W), told position by position."""
    rows, columns = torch.arange(height) // tile, torch.arange(width) // tile
    return keep[:, rows][:, :, columns][:, None]


@pytest.mark.parametrize("name", UNITS)
@given(sides, sides, st.integers(1, 5), st.integers(0, 2), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_kept_tile_answers_what_the_image_would(name, height, width, tile, spare, seed):
    """At any size: smaller than a tile, not divided by it, and with more halo than needed."""
    torch.manual_seed(seed)
    reads, make = UNITS[name]
    unit, tiles = make().double().eval(), Tiles(tile, reads + spare)
    tiles.check(unit)
    x, otherwise = (torch.randn(2, C, height, width, dtype=torch.float64) for _ in range(2))
    lead = tiles.grid(x)
    keep = (torch.rand(lead) < 0.5).double()
    index = keep.flatten().nonzero().squeeze(1)
    with torch.no_grad():
        sparse = tiles.put(tiles.call(unit, tiles.take(x, lead, index)), lead, index, otherwise)
        dense = tiles.mask(unit(tiles.whole(x, lead)), lead, keep.flatten(), otherwise)
        where = at_tiles(keep, tile, height, width)
        expected = torch.where(where > 0, unit(x), otherwise)
    assert torch.allclose(sparse, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(dense, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_tiles_come_home_unchanged(height, width, tile, seed):
    torch.manual_seed(seed)
    tiles, x = Tiles(tile), torch.randn(2, C, height, width)
    lead = tiles.grid(x)
    index = (torch.rand(lead) < 0.5).flatten().nonzero().squeeze(1)
    taken, inside = tiles.take(x, lead, index)
    assert taken.shape == (index.numel(), C, tile, tile) and inside.shape == (index.numel(), 1, tile, tile)
    assert torch.equal(tiles.put(taken, lead, index, otherwise=x), x)
    every = torch.arange(torch.Size(lead).numel())
    assert tiles.take(x, lead, every)[1].sum() == 2 * height * width, "every position lies inside one tile"


def test_putting_leaves_otherwise_as_it_was():
    tiles, x = Tiles(2), torch.zeros(1, 1, 4, 4)
    y = tiles.put(torch.ones(1, 1, 2, 2), (1, 2, 2), torch.tensor([3]), otherwise=x)
    assert y.sum() == 4 and (y[..., 2:, 2:] == 1).all() and not x.any()


def test_tiles_are_gathered_channels_last():
    x = torch.randn(2, 4, 8, 8)
    taken, _ = Tiles(4, 1).take(x, (2, 2, 2), torch.tensor([0, 3, 5]))
    assert taken.is_contiguous(memory_format=torch.channels_last)


def test_a_soft_keep_weighs_every_position_of_its_tile_and_gets_its_gradient():
    keep = torch.tensor([0.25, 1.0], requires_grad=True)
    tiles, y = Tiles(2), torch.ones(1, 1, 2, 3)
    blend = tiles.mask(y, (1, 1, 2), keep, otherwise=-y)
    assert blend[0, 0].tolist() == [[-0.5, -0.5, 1], [-0.5, -0.5, 1]]
    blend.sum().backward()
    assert keep.grad.tolist() == [8, 4], "two for each of a tile's positions"


def test_spread_repeats_a_tile_over_its_positions():
    per_tile = torch.arange(6.0).reshape(1, 2, 3)
    spread = Tiles(2).spread(per_tile, torch.zeros(1, 7, 3, 5, dtype=torch.float64))
    assert spread.dtype == torch.float64
    assert spread[0, 0].tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]


def test_the_grid_covers_the_image():
    assert Tiles(4).grid(torch.zeros(2, 3, 13, 8)) == (2, 4, 2)
    assert Tiles(1).grid(torch.zeros(0, 3, 2, 5)) == (0, 2, 5)


@pytest.mark.parametrize(("tile", "halo"), [(0, 0), (-1, 0), (4, -1)])
def test_impossible_tiles_are_refused(tile, halo):
    with pytest.raises(StructureError, match=f"got {tile} and {halo}"):
        Tiles(tile, halo)


@pytest.mark.parametrize("name", [name for name, (reads, _) in UNITS.items() if reads])
def test_a_halo_that_is_too_small_is_refused(name):
    reads, make = UNITS[name]
    Tiles(4, reads).check(make())
    with pytest.raises(StructureError, match=f"reads {reads} positions beyond a tile but the halo is {reads - 1}"):
        Tiles(4, reads - 1).check(make())


@pytest.mark.parametrize(
    ("unit", "says"),
    [
        (nn.Conv2d(C, C, 3, stride=2, padding=1), "stride-1 'same'"),
        (nn.Conv2d(C, C, 3), "stride-1 'same'"),
        (nn.Conv2d(C, C, 3, padding="valid"), "stride-1 'same'"),
        (nn.Conv2d(C, C, 3, padding=2), "stride-1 'same'"),
        (nn.Conv2d(C, C, 4, padding="same"), "stride-1 'same'"),
        (nn.Conv2d(C, C, 3, padding=1, dilation=2), "stride-1 'same'"),
        (nn.Conv2d(C, C, (3, 1), padding=(1, 0)), "square kernels"),
        (nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect"), "zero padding"),
        (nn.AdaptiveAvgPool2d(1), "AdaptiveAvgPool2d cannot run on tiles"),
        (nn.MaxPool2d(3, 1, 1), "MaxPool2d cannot run on tiles"),
        (nn.ConvTranspose2d(C, C, 3, padding=1), "ConvTranspose2d cannot run on tiles"),
        (nn.GroupNorm(1, C), "GroupNorm cannot run on tiles"),
    ],
)
def test_units_that_tiles_cannot_run_are_refused_where_they_are_built(unit, says):
    gate, tiles = Gate(TileScorer(C, 4), Threshold()), Tiles(4, 8)
    for branch in (unit, nn.Sequential(nn.ReLU(), nn.Sequential(unit))):
        with pytest.raises(StructureError, match=says):
            SpatialSkip(branch, gate, tiles)
        with pytest.raises(StructureError, match=says):
            PositionHalting([branch], TileScorer(C, 4), tiles)


def test_a_dynamic_layer_inside_a_spatial_unit_is_refused():
    skip = LayerSkip(conv(), Gate(TileScorer(C, 4), Threshold()))
    for branch in (skip, nn.Sequential(conv(), skip)):
        with pytest.raises(StructureError, match="LayerSkip lies inside a spatial unit"):
            SpatialSkip(branch, Gate(TileScorer(C, 4), Threshold()), Tiles(4, 8))
