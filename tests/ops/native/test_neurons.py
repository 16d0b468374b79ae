"""Native blocks of neurons answer what torch answers, and read nothing else."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional

from dynanet.core.macs import CountMacs
from dynanet.ops.native.neurons import neurons_down, neurons_up
from tests.ops.native.drawing import close, drawn, numbers, quick


@quick
@hypothesis.given(
    numbers(("rows", 0, 9), ("inputs", 1, 70), ("blocks", 1, 6), ("size", 1, 9), ("seed", 0, 99)), st.booleans()
)
def test_neurons_up(kernels, n, relu):
    x = drawn(1, n["inputs"], n["rows"]).t()  # not contiguous
    weight, bias = drawn(2, n["blocks"] * n["size"], n["inputs"]), drawn(3, n["blocks"] * n["size"])
    keep = (drawn(n["seed"], n["rows"], n["blocks"]) > 0).float()
    for shift in (bias, None):
        expected = functional.linear(x, weight, shift)
        expected = expected.relu() if relu else expected
        with CountMacs() as count:
            answer = neurons_up(x, weight, shift, keep, relu=relu)
        close(answer, expected * keep.repeat_interleave(n["size"], 1))
        assert count.total == keep.sum() * n["size"] * n["inputs"]


@quick
@hypothesis.given(numbers(("rows", 0, 9), ("outputs", 1, 70), ("blocks", 1, 6), ("size", 1, 9), ("seed", 0, 99)))
def test_neurons_down(kernels, n):
    hidden, weight = drawn(1, n["rows"], n["blocks"] * n["size"]), drawn(2, n["blocks"] * n["size"], n["outputs"])
    keep, bias = (drawn(n["seed"], n["rows"], n["blocks"]) > 0).float(), drawn(3, n["outputs"])
    for shift in (bias, None):
        with CountMacs() as count:
            answer = neurons_down(hidden, weight, shift, keep)
        expected = (hidden * keep.repeat_interleave(n["size"], 1)) @ weight
        close(answer, expected if shift is None else expected + shift)
        assert count.total == keep.sum() * n["size"] * n["outputs"]


@pytest.mark.parametrize("size", [1, 7, 16, 33, 64])
def test_nothing_is_read_beyond_the_arrays(kernels, fence, size):
    x, keep = fence(drawn(1, 5, size)), fence(torch.ones(5, 3))
    weight, bias = fence(drawn(2, 15, size)), fence(drawn(3, 15))
    hidden = neurons_up(x, weight, bias, keep, relu=False)
    close(hidden, functional.linear(x, weight, bias))
    close(neurons_down(fence(hidden), weight, None, keep), hidden @ weight)


def test_weights_of_blocks_that_no_row_keeps_are_not_read(kernels):
    keep = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    weight = torch.cat([torch.ones(3, 4), torch.full((3, 4), torch.nan)])
    hidden = neurons_up(torch.ones(2, 4), weight, None, keep, relu=False)
    assert hidden.tolist() == 2 * [[4, 4, 4, 0, 0, 0]]
    assert neurons_down(hidden, weight, None, keep).tolist() == 2 * [4 * [12]]


@pytest.mark.parametrize(
    ("x", "weight", "bias", "keep", "says"),
    [
        (torch.ones(3, 8).double(), torch.ones(6, 8), None, torch.ones(3, 2), "not float32"),
        (torch.ones(3, 8), torch.ones(8, 6).t(), None, torch.ones(3, 2), "do not lie in one piece"),
        (torch.ones(3, 8), torch.ones(6, 8), torch.ones(5), torch.ones(3, 2), "a bias of another shape"),
        (torch.ones(3, 8), torch.ones(6, 8), None, torch.ones(4, 2), "decisions about other rows"),
        (torch.ones(3, 8), torch.ones(6, 8), None, torch.ones(3, 4), "blocks that do not divide"),
    ],
)
def test_what_does_not_fit_together_is_refused(kernels, x, weight, bias, keep, says):
    with pytest.raises(ValueError, match=says):
        neurons_up(x, weight, bias, keep, relu=True)


def test_rows_of_another_width_than_the_weight_are_refused(kernels):
    with pytest.raises(ValueError, match="rows of another shape"):
        neurons_up(torch.ones(3, 7), torch.ones(6, 8), None, torch.ones(3, 2), relu=True)


def test_hidden_neurons_of_another_number_are_refused(kernels):
    with pytest.raises(ValueError, match="rows of another shape"):
        neurons_down(torch.ones(3, 5), torch.ones(6, 8), None, torch.ones(3, 2))


def test_nan_goes_through_a_relu(kernels):
    x = torch.tensor([[torch.nan] * 3])
    assert neurons_up(x, torch.ones(4, 3), None, torch.ones(1, 1), relu=True).isnan().all()


def test_operators_know_their_shapes_without_values():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        keep = torch.ones(3, 2)
        hidden = neurons_up(torch.ones(3, 8), torch.ones(6, 8), None, keep, relu=True)
        assert neurons_down(hidden, torch.ones(6, 5), None, keep).shape == (3, 5)
