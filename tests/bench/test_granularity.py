"""The same branch on tiles of every size: what ran, how quickly, and which tiles that speaks for."""

import pytest
import torch
from torch import nn

from dynanet.bench import TileTimes, tile_times
from dynanet.bench.granularity import TileTime
from dynanet.core.errors import ConfigError, InputError, StructureError


def branch(channels=4):
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, channels, 3, padding=1))


@pytest.fixture(scope="module")
def corner():
    """Images of 13 x 18 whose upper left corner is worth most."""
    scores = torch.zeros(2, 13, 18)
    scores[:, :8, :8] = 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    example = torch.randn(2, 4, 13, 18)
    yield tile_times(branch(), example, keep=0.27, tiles=(4, 1, 4), scores=scores, rounds=3, engines="eager")
    torch.set_num_threads(threads)


def test_what_ran_is_what_was_kept_and_what_is_read_around_it(corner):
    assert corner.keep == 0.27 and corner.dense_ms > 0 and len(corner.rows) == 4
    macs = {(row.tile, row.dilate): row.macs for row in corner.rows}
    # Of 20 tiles 5 are kept. By hand: with a halo of 2 the first convolution answers 6 x 6 for each, the second 4 x 4.
    assert macs[4, False] == pytest.approx(5 * (36 + 16) / (2 * 13 * 18))
    # Of 234 positions 63 are kept, 64 of which have the highest score; a halo is 3 x 3 for each.
    assert macs[1, False] == pytest.approx(63 * (9 + 1) / (2 * 13 * 18))
    assert (63 + 63) / (2 * 13 * 18) < macs[1, True] < macs[4, True] < macs[4, False]


def test_the_quickest_stands_first_and_the_table_says_all(corner):
    times = [row.faster for row in corner.rows]
    assert times == sorted(times, reverse=True) and all(row.low <= row.faster <= row.high for row in corner.rows)
    lines = str(corner).splitlines()
    assert len(lines) == 6 and "halos" in str(corner) and "dilated" in str(corner) and "everywhere" in lines[-1]


def row(tile, faster, dilate=False):
    return TileTime(tile, dilate, 0.3, 1 / faster, faster, faster, faster)


def test_the_finest_tiles_that_are_about_as_quick():
    rows = (row(16, 2.0), row(8, 1.9), row(4, 1.85, dilate=True), row(4, 1.82), row(1, 0.8))
    times = TileTimes(0.3, 1.0, rows)
    assert times.finest() is rows[2] and times.finest(slack=0.06) is rows[1] and times.finest(slack=0) is rows[0]
    assert times.finest(slack=0.9) is rows[2], "tiles that lose to the dense branch are never chosen"
    assert TileTimes(0.3, 1.0, (row(8, 0.9), row(4, 0.5))).finest() is None
    with pytest.raises(ConfigError, match=r"a slack of 1"):
        times.finest(slack=1)


def test_images_smaller_than_a_tile():
    times = tile_times(branch(), torch.randn(1, 4, 3, 2), keep=0.1, tiles=(8,), rounds=1, engines="eager")
    assert [row.tile for row in times.rows] == [8, 8]
    assert {row.dilate: row.macs for row in times.rows}[True] == 1  # one tile at least, and no more than there is


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"keep": 0.0}, ConfigError, "keep is 0.0"),
        ({"tiles": ()}, ConfigError, r"tiles \(\)"),
        ({"tiles": (0,)}, ConfigError, r"tiles \(0,\)"),
        ({"rounds": 0}, ConfigError, "rounds 0"),
        ({"scores": torch.ones(1, 5, 5)}, InputError, r"scores of shape \(1, 5, 5\)"),
        ({"example": torch.zeros(0, 4, 6, 6)}, InputError, r"\(0, 4, 6, 6\)"),
        ({"example": torch.zeros(4, 6, 6)}, InputError, r"\(4, 6, 6\)"),
        ({"branch": nn.Conv2d(4, 4, 3, stride=2)}, StructureError, "stride-1"),
    ],
)
def test_what_is_refused(wrong, error, says):
    given = {"branch": branch(), "example": torch.zeros(1, 4, 6, 6), "engines": "eager"} | wrong
    with pytest.raises(error, match=says):
        tile_times(given.pop("branch"), given.pop("example"), **given)
