import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynanet.gates.scorers import PooledScorer, TileScorer
from dynanet.ops.tiles import tile_mean


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("units", "hidden"), [(1, 16), (3, 4), (2, 0)])
def test_a_pooled_scorer_answers_one_score_per_sample_and_unit(units, hidden):
    scorer = PooledScorer(6, units, hidden)
    for batch, height, width in ((5, 7, 3), (1, 1, 1), (0, 4, 4)):
        assert scorer(torch.randn(batch, 6, height, width)).shape == (batch, units)


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_pooled_scorer_sees_the_mean_of_every_channel(hidden):
    scorer, x = PooledScorer(6, 2, hidden).double(), torch.randn(4, 6, 5, 5, dtype=torch.float64)
    shuffled = x.flatten(2)[:, :, torch.randperm(25)].unflatten(2, (5, 5))
    assert torch.allclose(scorer(shuffled), scorer(x))
    assert torch.allclose(scorer(x.mean((2, 3), keepdim=True)), scorer(x))


@pytest.mark.parametrize("hidden", [0, 8])
def test_the_bias_is_where_the_scores_start(hidden):
    scorer = PooledScorer(6, 3, hidden, bias=2.5)
    scores = scorer(1e-6 * torch.randn(50, 6, 4, 4))
    assert (scores > 0).all(), "a new gate keeps"
    last = scorer.map[-1] if hidden else scorer.map
    assert last.bias.tolist() == [2.5] * 3


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_tile_means_over_the_positions_that_exist(height, width, tile):
    x = torch.arange(2.0 * height * width, dtype=torch.float64).reshape(2, 1, height, width)
    mean = tile_mean(x, tile)
    down, across = -(-height // tile), -(-width // tile)
    assert mean.shape == (2, down, across, 1)
    for i in range(down):
        for j in range(across):
            part = x[:, 0, i * tile : (i + 1) * tile, j * tile : (j + 1) * tile]
            assert torch.allclose(mean[:, i, j, 0], part.mean((1, 2)))


def test_a_tile_scorer_is_its_convolution_averaged_over_tiles():
    scorer, x = TileScorer(3, 4), torch.randn(2, 3, 7, 9)
    assert scorer(x).shape == (2, 2, 3, 1)
    assert torch.allclose(scorer(x), tile_mean(scorer.map(x), 4))
    assert torch.allclose(scorer(x)[:, 1, 2, 0], scorer.map(x[:, :, 4:, 8:]).mean((1, 2, 3)), atol=1e-6)
    assert scorer(x[:0]).shape == (0, 2, 3, 1)
