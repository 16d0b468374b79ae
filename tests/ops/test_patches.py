import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dynanet.core.errors import StructureError
from dynanet.ops.patches import Patches


def unfolded(x, size):
    """Every pixel's patch by torch's own hand: (B H W, C, P, P)."""
    batch, channels, height, width = x.shape
    columns = F.unfold(x, size, padding=size // 2)
    return columns.transpose(1, 2).reshape(batch * height * width, channels, size, size)


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3, 5, 9]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_patches_are_those_of_unfold(batch, height, width, size, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2, height, width, generator=random)
    rows, lead = Patches(size), (batch, height, width)
    expected = unfolded(x, size)
    assert torch.equal(rows.whole(x, lead), expected)
    index = (torch.rand(expected.shape[0], generator=random) < 0.5).nonzero().squeeze(1)
    assert torch.equal(rows.take(x, lead, index), expected[index])
    assert torch.equal(rows.take(x.to(memory_format=torch.channels_last), lead, index), expected[index])


def test_answers_come_home_to_their_pixels():
    x, lead = torch.randn(2, 3, 4, 5), (2, 4, 5)
    rows, otherwise = Patches(3), torch.zeros(2, 4, 5, 3)
    index = torch.tensor([0, 7, 39])
    centres = rows.take(x, lead, index)[:, :, 1, 1]
    home = rows.put(centres, lead, index, otherwise)
    where = torch.zeros(40, 1)
    where[index] = 1
    assert torch.equal(home, x.permute(0, 2, 3, 1) * where.reshape(2, 4, 5, 1))
    dense = rows.mask(rows.whole(x, lead)[:, :, 1, 1], lead, where.flatten(), otherwise)
    assert torch.equal(dense, home)


def test_no_pixel_and_no_image():
    rows, x = Patches(3), torch.randn(2, 3, 4, 5)
    assert rows.take(x, (2, 4, 5), torch.empty(0, dtype=torch.long)).shape == (0, 3, 3, 3)
    assert rows.whole(x[:0], (0, 4, 5)).shape == (0, 3, 3, 3)


@pytest.mark.parametrize("size", [0, 2, 4, -1])
def test_a_patch_without_a_centre_is_refused(size):
    with pytest.raises(StructureError, match=f"odd; got {size}"):
        Patches(size)
