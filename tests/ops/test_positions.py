"""Positions know their neighbours, and a unit how far it reads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dynanet.ops.positions import (
    PositionChain,
    check_unit,
    layers_of,
    neighbours,
    neighbours_of_all,
    padding,
    reads_neighbours,
    row_numbers,
)

SIZES = st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6))


@settings(deadline=None, max_examples=40)
@given(SIZES, st.sampled_from([1, 3, 5]), st.sampled_from([1, 3]), st.integers(1, 3), st.integers(1, 2))
def test_neighbours_are_what_a_convolution_reads(shape, down, across, step, side_step):
    kernel, dilation = (down, across), (step, side_step)
    image = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape[0], 1, *shape[1:])
    pads = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
    expected = functional.unfold(image, kernel, dilation, pads).transpose(1, 2).flatten(0, 1)
    rows = functional.pad(image.flatten(), (0, 1))  # beyond an edge lies nothing
    index = torch.randperm(rows.numel() - 1, generator=torch.Generator().manual_seed(0))[:7]
    assert torch.equal(rows[neighbours(index, shape, kernel, dilation)], expected[index])
    assert torch.equal(rows[neighbours_of_all(shape, kernel, dilation, index.device)], expected)


@given(st.sets(st.integers(0, 19)), st.randoms(use_true_random=False))
def test_row_numbers_undo_an_index(places, random):
    index = sorted(places)
    random.shuffle(index)
    numbers = row_numbers(torch.tensor(index, dtype=torch.int64), 20)
    assert numbers[index].tolist() == list(range(len(index)))
    assert all(numbers[i] == len(index) for i in range(21) if i not in places)


@pytest.mark.parametrize(
    ("layer", "down", "across"),
    [
        (nn.Conv2d(1, 1, 3, padding="same"), 1, 1),
        (nn.Conv2d(1, 1, (3, 5), padding="same", dilation=(1, 2)), 1, 4),
        (nn.Conv2d(1, 1, 3, padding=2), 2, 2),
        (nn.Conv2d(1, 1, 3, padding="valid"), 0, 0),
        (nn.Conv2d(1, 1, 1), 0, 0),
        (nn.ReLU(), 0, 0),
    ],
)
def test_padding_in_positions(layer, down, across):
    assert padding(layer) == (down, across) and reads_neighbours(layer) == (down > 0)


def test_layers_are_flat_and_without_those_that_do_nothing():
    first, second, third = nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1)
    unit = nn.Sequential(first, nn.Identity(), nn.Sequential(nn.Sequential(second), nn.Sequential(), third))
    assert layers_of(unit) == [first, second, third] and layers_of(first) == [first] and layers_of(nn.Identity()) == []


def test_a_unit_reads_as_far_as_a_change_is_felt():
    unit = nn.Sequential(nn.Conv2d(1, 1, 3, padding=2, dilation=2), nn.Tanh(), nn.Conv2d(1, 1, 3, padding=1)).double()
    x = torch.zeros(1, 1, 11, 11, dtype=torch.float64)
    lit = x.clone()
    lit[0, 0, 5, 5] = 1
    felt = (unit(lit) - unit(x)).abs()[0, 0].nonzero()
    assert int((felt - 5).abs().max()) == check_unit(unit) == 3


def test_a_chain_begins_a_part_where_neighbours_are_read():
    first, relu, second, third = nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 1)
    unit = nn.Sequential(first, relu, second, third)
    chain = PositionChain(unit)
    assert chain.parts == [[first, relu], [second, third]] and not chain.refresh()
    unit[1] = nn.Identity()
    assert chain.refresh() and chain.parts == [[first], [second, third]]
    unit[0] = nn.Conv2d(1, 1, 3, padding=1)
    assert chain.refresh() and [len(part) for part in chain.parts] == [0, 1, 2]


def test_later_convolutions_find_zeros_where_nothing_is_kept():
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)
    chain, x, keep = PositionChain(nn.Sequential(first, second)), torch.randn(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
    keep[..., :2] = 1
    assert torch.equal(chain.dense(x), second(first(x)))
    assert torch.equal(chain.dense(x, keep), second(first(x) * keep))
