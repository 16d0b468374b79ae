"""Native kernels answer what torch answers, whatever the shapes, and touch nothing outside their arrays."""

import copy

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dynanet.core.macs import CountMacs
from dynanet.ops.native import library
from dynanet.ops.native.products import PackedWeights, product, product_add_
from tests.ops.native.drawing import close, drawn, numbers, quick


@quick
@hypothesis.given(
    numbers(("outputs", 1, 70), ("channels", 1, 40), ("taps", 1, 9), ("rows", 1, 20), ("seed", 0, 99)),
    st.lists(st.integers(0, 27), min_size=1, max_size=3),
    st.booleans(),
)
def test_products(kernels, n, counts, relu):
    m, groups, generator = sum(counts), len(counts), torch.Generator().manual_seed(n["seed"])
    weights = drawn(1, groups, n["outputs"], n["taps"] * n["channels"])
    biases = drawn(2, groups, n["outputs"]) if n["seed"] % 2 else None
    packed, bias = PackedWeights().of(list(weights), [None] * groups if biases is None else list(biases))
    rows = drawn(3, n["channels"], n["rows"]).t()
    around = torch.randint(-1, n["rows"], (m, n["taps"]), generator=generator)
    gathered = torch.cat([rows, rows.new_zeros(1, n["channels"])])[around].flatten(1)
    parts = [functional.linear(a, w) for a, w in zip(gathered.split(counts), weights, strict=True)]
    if biases is not None:
        parts = [part + b for part, b in zip(parts, biases, strict=True)]
    expected = torch.cat(parts).relu() if relu else torch.cat(parts)
    with CountMacs() as count:
        answer = product(rows, packed, bias, n["outputs"], counts=counts, around=around, relu=relu)
    close(answer, expected)
    assert count.total == m * n["outputs"] * n["taps"] * n["channels"]

    to, scale = torch.randint(0, 5, (m,), generator=generator), drawn(4, m)
    start = drawn(5, 5, n["outputs"])
    total = start.clone()
    product_add_(total, rows, packed, bias, counts=counts, to=to, around=around, relu=relu, scale=scale)
    close(total, start.index_add(0, to, expected * scale[:, None]))


def test_threads_share_the_columns(kernels):
    weight, x = drawn(1, 300, 128), drawn(2, 400, 128)
    packed, _ = PackedWeights().of([weight], [None])
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            answers.append(product(x, packed, None, 300, counts=[400]))
    finally:
        torch.set_num_threads(before)
    close(answers[0], x @ weight.t())
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_nan_goes_through_a_relu(kernels):
    x = torch.tensor([[torch.nan] * 3])
    packed, _ = PackedWeights().of([torch.ones(33, 3)], [None])
    assert product(x, packed, None, 33, counts=[1], relu=True).isnan().all()


def test_indices_that_point_outside_are_refused(kernels):
    packed, _ = PackedWeights().of([torch.ones(4, 3)], [None])
    x, answer = torch.ones(5, 3), torch.ones(2, 4)
    with pytest.raises(ValueError, match="outside"):
        product(x, packed, None, 4, counts=[1], around=torch.tensor([[5]]))
    for place in (2, -1):
        with pytest.raises(ValueError, match="outside"):
            product_add_(answer, x, packed, None, counts=[1], to=torch.tensor([place]))
    assert torch.equal(answer, torch.ones(2, 4))


@pytest.mark.parametrize("size", [1, 7, 16, 33, 64])
def test_nothing_is_read_beyond_the_arrays(kernels, fence, size):
    x = fence(drawn(1, 5, size))
    packed, stacked = PackedWeights().of([drawn(4, size, 9 * size)], [drawn(5, size)])
    around, to = fence(torch.randint(-1, 5, (13, 9))), fence(torch.arange(13))
    answer, scale = fence(torch.zeros(13, size)), fence(torch.ones(13))
    packed, stacked = fence(packed), fence(stacked)
    product_add_(answer, x, packed, stacked, counts=[13], to=to, around=around, scale=scale)
    close(answer, product(x, packed, stacked, size, counts=[13], around=around))


def test_packed_weights_follow_their_source(kernels):
    weight, x = drawn(1, 5, 4), drawn(2, 3, 4)
    packed = PackedWeights()

    def answer():
        return product(x, *packed.of([weight], [None]), 5, counts=[3])

    first = packed.of([weight], [None])[0]
    assert packed.of([weight], [None])[0] is first
    close(answer(), x @ weight.t())
    weight.mul_(2)
    close(answer(), x @ weight.t())
    weight = drawn(3, 5, 4)
    close(answer(), x @ weight.t())
    other = copy.deepcopy(packed)
    assert other.of([weight], [None])[0] is not packed.of([weight], [None])[0]
    with torch.inference_mode():
        assert PackedWeights().of([drawn(1, 5, 4)], [None]) is None, "nothing would tell when it changes"
    for unfit in (weight.double(), nn.Parameter(weight)):
        assert packed.of([unfit], [None]) is None


def test_packed_weights_are_packed_again_for_another_instruction_set():
    weight, x, packed = drawn(1, 40, 4), drawn(2, 3, 4), PackedWeights()
    for name in library.instruction_sets():
        with library.using(name):
            close(product(x, *packed.of([weight], [None]), 40, counts=[3]), x @ weight.t())


def test_large_weights_lie_on_large_pages(kernels):
    weight = drawn(1, 1100, 1024)
    packed, _ = PackedWeights().of([weight], [None])
    assert packed.data_ptr() % 2**21 == 0
    close(product(drawn(2, 2, 1024), packed, None, 1100, counts=[2]), drawn(2, 2, 1024) @ weight.t())


def test_operators_know_their_shapes_without_values():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert product(torch.ones(3, 8), torch.ones(2, 1, 8, 32), None, 7, counts=[2, 1]).shape == (3, 7)
