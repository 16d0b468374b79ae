import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynanet.core.errors import StructureError
from dynanet.core.rows import LEADING, over_tensors, take_rows

leads = st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple)
features = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def drawn(lead, shape, seed):
    """(x, otherwise, keep): keep is flat and hard."""
    random = torch.Generator().manual_seed(seed)
    keep = (torch.rand(torch.Size(lead).numel(), generator=random) < 0.5).double()
    x, otherwise = (torch.randn(*lead, *shape, dtype=torch.float64, generator=random) for _ in range(2))
    return x, otherwise, keep


def unit(rows):
    return rows**2 + 1


@given(leads, features, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_taking_and_putting_back_is_masking_for_hard_keeps(lead, shape, seed):
    x, otherwise, keep = drawn(lead, shape, seed)
    index = keep.nonzero().squeeze(1)
    sparse = LEADING.put(unit(LEADING.take(x, lead, index)), lead, index, otherwise)
    dense = LEADING.mask(unit(LEADING.whole(x, lead)), lead, keep, otherwise)
    assert sparse.shape == dense.shape == x.shape
    assert torch.equal(sparse, dense)


@given(leads, features, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rows_that_only_travel_come_home_unchanged(lead, shape, seed):
    x, _, keep = drawn(lead, shape, seed)
    index = keep.nonzero().squeeze(1)
    assert torch.equal(LEADING.put(LEADING.take(x, lead, index), lead, index, otherwise=x), x)


def test_taking_every_row_copies_nothing():
    x = torch.randn(3, 4, 2)
    assert LEADING.take(x, (3, 4), torch.arange(12)).data_ptr() == x.data_ptr()


def test_a_soft_keep_blends_and_both_sides_and_the_keep_get_a_gradient():
    keep = torch.tensor([0.25, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    y, otherwise = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    blend = LEADING.mask(y, (3,), keep, otherwise)
    assert torch.allclose(blend[0], 0.25 * y[0] + 0.75 * otherwise[0])
    blend.sum().backward()
    assert torch.allclose(keep.grad, (y - otherwise).sum(1))
    assert torch.allclose(y.grad[:, 0], keep) and torch.allclose(otherwise.grad[:, 0], 1 - keep)


def test_pytrees_travel_whole_and_what_is_no_tensor_stays():
    tree = {"a": torch.arange(4.0), "b": (torch.arange(8.0).reshape(4, 2), None, "name", 7)}
    taken = LEADING.take(tree, (4,), torch.tensor([2, 0]))
    assert taken["a"].tolist() == [2, 0] and taken["b"][0].tolist() == [[4, 5], [0, 1]]
    assert taken["b"][1:] == (None, "name", 7)
    home = LEADING.put(over_tensors(lambda t: t + 100, taken), (4,), torch.tensor([2, 0]), otherwise=tree)
    assert home["a"].tolist() == [100, 1, 102, 3] and home["b"][1:] == (None, "name", 7)


@pytest.mark.parametrize("keep", [[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_channels_last_is_kept(keep):
    x = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)
    index = torch.tensor(keep).nonzero().squeeze(1)
    taken = LEADING.take(x, (4,), index)
    assert taken.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(taken, x[index])


def test_contiguous_images_stay_contiguous():
    assert take_rows(torch.randn(4, 3, 5, 6), torch.tensor([2, 0])).is_contiguous()


def test_a_tensor_without_the_rows_in_front_is_refused():
    state = (torch.zeros(4, 2), torch.zeros(2, 4))
    with pytest.raises(StructureError, match=r"shape \(2, 4\) cannot be split into rows \(4,\)"):
        LEADING.take(state, (4,), torch.tensor([0, 1]))
