"""What a model cannot take is refused in one line that says what came, what was expected and what to do."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynanet.core.errors import InputError
from dynanet.session.inputs import check_input

IMAGE = torch.zeros(1, 3, 6, 5)
PAIR = {"image": IMAGE, "place": (torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))}


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_any_batch_will_do(batch):
    check_input(torch.randn(batch, 3, 6, 5), IMAGE)
    place = torch.randn(batch, 2), torch.ones(batch, dtype=torch.int64)
    check_input({"image": torch.randn(batch, 3, 6, 5), "place": place}, PAIR)


@pytest.mark.parametrize(
    "x, says",
    [
        (torch.zeros(2, 1, 6, 5), r"\(2, 1, 6, 5\); expected \(batch, 3, 6, 5\): 1 channels instead of 3"),
        (torch.zeros(2, 3, 5, 6), "another size; resize or cut"),
        (torch.zeros(3, 6, 5), r"the batch axis is missing; add it with x\[None\]"),
        (torch.zeros(1, 2, 3, 6, 5), "5 axes instead of 4"),
        (torch.zeros(5), "1 axes instead of 4"),
        (torch.tensor(1.0), "0 axes instead of 4"),
        (torch.zeros(2, 3, 6, 5, dtype=torch.float64), r"torch.float64; expected torch.float32: .* x.to\("),
        (torch.zeros(2, 3, 6, 5, dtype=torch.uint8), "torch.uint8"),
        ([IMAGE], r"list; expected a torch.float32 tensor of shape \(batch, 3, 6, 5\)"),
        (None, "NoneType"),
        ("image.png", "str"),
        (IMAGE.numpy(), "ndarray"),
    ],
)
def test_another_shape_or_kind(x, says):
    with pytest.raises(InputError, match=says) as caught:
        check_input(x, IMAGE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "x, says",
    [
        ({"image": IMAGE}, "dict"),
        ({"image": IMAGE, "place": (torch.zeros(1, 2), None)}, "dict"),
        (IMAGE, "Tensor; expected a torch.float32 tensor of shape .*, a torch.int64 tensor"),
        ({"image": IMAGE, "place": (torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))}, "3 channels instead of 2"),
        ({"image": IMAGE, "place": (torch.zeros(1, 2), torch.zeros(1))}, "expected torch.int64"),
        (
            {"image": IMAGE, "place": (torch.zeros(4, 2), torch.zeros(1, dtype=torch.int64))},
            r"\[1, 4, 1\] samples .* the same number in every tensor",
        ),
    ],
)
def test_another_structure(x, says):
    with pytest.raises(InputError, match=says) as caught:
        check_input(x, PAIR)
    assert "\n" not in str(caught.value)


@given(
    st.lists(st.sampled_from([math.nan, math.inf, -math.inf]), min_size=1, max_size=3),
    st.lists(st.integers(0, 11), min_size=3, max_size=3),
    st.integers(0, 89),
)
def test_samples_that_are_not_finite_are_named(values, samples, place):
    x = torch.randn(12, 3, 6, 5)
    for value, sample in zip(values, samples, strict=False):
        x[sample].view(-1)[place] = value
    spoiled = sorted(set(samples[: len(values)]))
    with pytest.raises(InputError) as caught:
        check_input(x, IMAGE)
    assert str(caught.value).startswith(f"NaN or infinite values in sample(s) {spoiled} ")


def test_many_of_them_are_counted():
    with pytest.raises(InputError, match=r"sample\(s\) \[0, 1, 2, 3, 4\] and 15 more"):
        check_input(torch.full((20, 3, 6, 5), torch.nan), IMAGE)


def test_large_values_are_no_fault():
    check_input(torch.full((2, 3, 6, 5), 3e38), IMAGE)  # their sum is infinite
    check_input(torch.cat([torch.full((1, 3, 6, 5), 3e38), torch.full((1, 3, 6, 5), -3e38)]), IMAGE)
    half = torch.zeros(1, 3, 6, 5, dtype=torch.float16)
    check_input(torch.full((2, 3, 6, 5), 6e4, dtype=torch.float16), half)


def test_whole_numbers_are_never_nan():
    check_input(torch.full((2, 4), 7), torch.zeros(1, 4, dtype=torch.int64))
