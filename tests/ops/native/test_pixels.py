"""Native operators on pixels answer what torch answers, at any size, and touch nothing outside their arrays."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dynanet.core.macs import CountMacs
from dynanet.gates.scorers import ContextScorer
from dynanet.ops.native import library
from dynanet.ops.native.chains import Chain
from dynanet.ops.native.pixels import Convolution, channels_last, convolutions, scores

quick = hypothesis.settings(
    deadline=None, max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
sides = st.integers(1, 19)
channels = st.sampled_from([1, 2, 3, 5, 16, 17, 36, 64, 200])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


@quick
@hypothesis.given(st.integers(0, 3), channels, sides, sides)
def test_images_become_rows(kernels, batch, c, height, width):
    x = drawn(1, batch, c, height, width)
    ours = channels_last(x)
    assert torch.equal(ours, x) and ours.is_contiguous(memory_format=torch.channels_last)
    assert channels_last(ours) is ours
    assert torch.equal(channels_last(x[:, :, :, ::2]), x[:, :, :, ::2]), "what is in pieces stays as it is"
    assert torch.equal(channels_last(x.double()), x.double())


def scorer(c, tile):
    torch.manual_seed(c)
    made = ContextScorer(c, tile, bias=0.3)
    nn.init.normal_(made.local[0].weight)
    return made.requires_grad_(False)


@quick
@hypothesis.given(st.integers(1, 3), channels, sides, sides, st.integers(1, 30))
def test_scores_of_positions_and_tiles(kernels, batch, c, height, width, tile):
    x, made = last(drawn(1, batch, c, height, width) + 1), scorer(c, tile)
    with library.using(""), CountMacs() as theirs:
        expected = made(x)
    with CountMacs() as ours:
        answer = made(x)
        direct = scores(x, made.local[0], made.context, tile)
    close(answer, expected)
    assert torch.equal(answer, direct)
    assert ours.total == 2 * theirs.total == 2 * batch * c * (9 * height * width + 1)


def test_one_position_that_is_no_number_spoils_its_image_and_no_other(kernels):
    x, made = last(drawn(1, 2, 5, 6, 7)), scorer(5, 2)
    x[0, 3, 4, 4] = torch.nan
    answer = made(x)
    assert answer[0].isnan().all() and not answer[1].isnan().any()
    with library.using(""):
        close(answer, made(x))


def test_scores_in_the_other_layout_or_in_training_stay_with_torch(kernels):
    x, made = drawn(1, 2, 5, 6, 7), scorer(5, 1)
    assert scores(x, made.local[0], made.context, 1) is None
    assert scores(last(x)[:0], made.local[0], made.context, 1) is None
    close(made(x), made(last(x)))
    assert made.native and not ContextScorer(5, norm=True).native
    made.requires_grad_(True)
    with torch.enable_grad():
        assert scores(last(x), made.local[0], made.context, 1) is None and not made.native
        assert made(last(x)).requires_grad


def around(keep, reach):
    """Flat positions near a kept one, by torch."""
    return functional.max_pool2d(keep, 2 * reach + 1, 1, reach).flatten().nonzero()[:, 0]


def chain(*layers):
    """Convolutions of random weights, their packed weights, and how far each reads beyond the last."""
    reads = [conv.padding[0] for conv in layers]
    packed = Chain().ready(list(layers))
    return [Convolution(conv, i % 2 == 0, sum(reads[i + 1 :])) for i, conv in enumerate(layers)], packed


def dense(steps, x):
    """All positions, but zeros where the next convolution would read what was not computed: there is no such place."""
    for layer, relu, _ in steps:
        x = layer(x).relu() if relu else layer(x)
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def conv(inside, outside, kernel, dilation=1, bias=True):
    return nn.Conv2d(
        inside, outside, kernel, padding=dilation * (kernel - 1) // 2, dilation=dilation, bias=bias
    ).requires_grad_(False)


@quick
@hypothesis.given(
    st.integers(1, 3),
    sides,
    sides,
    st.lists(st.tuples(channels, st.sampled_from([1, 1, 3, 5]), st.integers(1, 3)), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.booleans(),
)
def test_convolutions_where_a_mask_says_so(kernels, batch, height, width, sizes, share, bias):
    torch.manual_seed(height * width)
    inside = [3, *(size[0] for size in sizes)]
    steps, packed = chain(*(conv(c, *size, bias=bias) for c, size in zip(inside, sizes, strict=False)))
    x = drawn(2, batch, 3, height, width)
    keep = (torch.rand(batch, 1, height, width) < share).float()
    rows, expected = x.permute(0, 2, 3, 1).flatten(0, 2).contiguous(), dense(steps, x)
    places = keep.flatten().nonzero()[:, 0]
    with CountMacs() as count:
        answer = convolutions(rows, steps, packed, keep)
    close(answer, expected[places])
    spent = [len(around(keep, reach)) * layer.weight.numel() for layer, _, reach in steps]
    assert count.total == sum(spent)
    total = drawn(3, len(rows), sizes[-1][0])
    with CountMacs() as count:
        added = convolutions(rows, steps, packed, keep, into=total.clone())
    close(added, total.index_add(0, places, expected[places]))
    assert count.total == sum(spent)
    one_by_one, before = rows, None
    for step in steps:
        one_by_one = convolutions(one_by_one, [step], packed, keep, before)
        before = step.reach
    close(one_by_one, answer)


def test_a_position_that_is_no_number_reaches_its_neighbours_only(kernels):
    steps, packed = chain(conv(4, 40, 3), conv(40, 4, 1))
    x = drawn(1, 1, 4, 7, 7)
    x[0, 2, 3, 3] = torch.nan
    answer = convolutions(x.permute(0, 2, 3, 1).reshape(49, 4), steps, packed, torch.ones(1, 1, 7, 7))
    spoilt = answer.isnan().all(1).view(7, 7)
    assert spoilt[2:5, 2:5].all() and spoilt.sum() == 9 == answer.isnan().any(1).sum()


def test_threads_divide_the_work_and_not_the_answer(kernels):
    x, made, before = drawn(1, 3, 64, 40, 40), scorer(64, 1), torch.get_num_threads()
    steps, packed = chain(conv(64, 96, 3))
    answers = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            rows = channels_last(x)
            flat = rows.permute(0, 2, 3, 1).flatten(0, 2)
            answers.append((rows, made(rows), convolutions(flat, steps, packed, torch.ones(3, 1, 40, 40))))
    finally:
        torch.set_num_threads(before)
    for other in answers[1:]:
        assert all(map(torch.equal, answers[0], other))


def test_what_does_not_fit_is_refused(kernels):
    steps, packed = chain(conv(4, 5, 1), conv(5, 6, 3), conv(6, 4, 1))
    keep = torch.zeros(1, 1, 5, 5)
    keep[0, 0, 2, 2] = 1
    rows, near = torch.ones(25, 4), torch.ones(9, 5)
    assert convolutions(near, steps[1:], packed, keep, 1).shape == (1, 4)
    for given, which, before, says in (
        (rows[:24], steps, None, "24 rows"),  # not all positions
        (near[:8], steps[1:], 1, "8 rows"),  # not those around the kept one
        (near[:1], steps[1:2], 0, "1 rows"),  # no neighbours
        (torch.ones(25, 3), steps, None, "packed weights of shape"),
        (rows.double(), steps, None, "float32"),
        (rows, [steps[1]], None, "packed weights of shape"),
    ):
        with pytest.raises(ValueError, match=says):
            convolutions(given, which, packed, keep, before)
    with pytest.raises(ValueError, match="places of another size"):
        convolutions(rows, steps, packed, keep, into=torch.ones(24, 4))
    with pytest.raises(ValueError, match="weights of another shape"):
        torch.ops.dynanet.scores(last(torch.ones(1, 3, 2, 2)), torch.ones(1, 4, 3, 3), torch.ones(1), torch.ones(3), 1)


@pytest.mark.parametrize("c", [1, 7, 16, 33, 64])
def test_nothing_is_read_beyond_the_arrays(kernels, fence, c):
    x = drawn(1, 2, c, 5, 7)
    images = fence(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    assert torch.equal(channels_last(fence(x)), images)
    made = scorer(c, 2)
    with library.using(""):
        expected = made(x)
    for weight in (made.local[0].weight, made.local[0].bias, made.context.weight):
        weight.data = fence(weight.data)
    close(made(images), expected)
    steps, packed = chain(conv(c, c, 3), conv(c, 2 * c, 1))
    keep = fence((drawn(2, 2, 1, 5, 7) > 0).float())
    packed = {layer: (fence(weight), fence(bias)) for layer, (weight, bias) in packed.items()}
    answer = convolutions(
        fence(images.permute(0, 2, 3, 1).reshape(70, c)), steps, packed, keep, into=torch.zeros(70, 2 * c)
    )
    close(answer, dense(steps, x) * keep.view(70, 1))


def test_operators_know_their_shapes_without_values():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x, one = torch.ones(2, 8, 5, 6), torch.ones(1)
        rows = torch.ops.dynanet.channels_last(x)
        assert rows.shape == x.shape and rows.is_contiguous(memory_format=torch.channels_last)
        weights = torch.ones(1, 8, 3, 3), one, torch.ones(1, 8, 1, 1)
        assert torch.ops.dynanet.scores(rows, *weights, 4).shape == (2, 2, 2, 1)
