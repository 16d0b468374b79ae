"""Native attention among packed rows answers what torch answers, sample by sample, and touches nothing else."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional

from dynanet.core.macs import CountMacs
from dynanet.ops.native import library
from dynanet.ops.native.attention import attend_packed, mean_packed
from dynanet.ops.tokens import Tokens, attend
from tests.ops.native.drawing import drawn

inf, nan = torch.inf, torch.nan
quick = hypothesis.settings(
    deadline=None, max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def by_torch(query, key, value, bias, lengths, heads):
    """In float64, with nothing but a softmax."""
    answers = []
    biases = [None] * len(lengths) if bias is None else bias.double().split(lengths)
    for *of, b in zip(*(t.double().split(lengths) for t in (query, key, value)), biases, strict=True):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in of)
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        answers.append((logits if b is None else logits + b).softmax(-1) @ v)
    return torch.cat([a.transpose(0, 1).flatten(1) for a in answers])


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs.float(), rtol=tolerance, atol=tolerance, equal_nan=True)


@quick
@hypothesis.given(
    st.lists(st.one_of(st.integers(0, 40), st.sampled_from([0, 1, 16, 32, 255, 256, 257, 600])), max_size=4),
    st.integers(1, 4), st.integers(1, 70), st.booleans(), st.booleans(),
)  # fmt: skip
def test_it_is_attention_in_every_sample(kernels, lengths, heads, size, biased, apart):
    rows, width = sum(lengths), heads * size
    of = drawn(1, rows, 3 * width).chunk(3, -1)  # side by side, as a linear hands them on
    if apart:
        of = of[0], drawn(2, width, rows).t(), drawn(3, 1, width).expand(rows, width)
    bias = drawn(4, rows, 2)[:, 0] if biased else None
    with CountMacs() as count:
        answer = attend_packed(*of, bias, lengths, heads)
    assert answer.shape == (rows, width) and answer.is_contiguous()
    assert count.total == 2 * sum(n * n for n in lengths) * width
    if lengths:
        close(answer, by_torch(*of, bias, lengths, heads))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 20.0])
def test_weights_of_all_sizes(kernels, scale):
    q, k, v = drawn(1, 3, 300, 32) * torch.tensor([scale, 1, 1])[:, None, None]
    close(attend_packed(q, k, v, None, [300], 1), by_torch(q, k, v, None, [300], 1), 2e-5)
    # A score that is far below another has the weight that it should have, down to nothing.
    for score in (0.0, -1.0, -30.0, -80.0, -87.3, -200.0):
        shift = torch.tensor([0.0, score])
        weight = torch.tensor([[1.0], [torch.finfo().max]])  # large, for what is hardly there
        expected = shift.double().exp() / shift.double().exp().sum() @ weight.double()
        answer = attend_packed(torch.zeros(2, 1), torch.zeros(2, 1), weight, shift, [2], 1)
        torch.testing.assert_close(answer[0].double(), expected, rtol=1e-5, atol=0)


def test_one_key_hands_on_its_value(kernels):
    q, k, v = drawn(1, 3, 9, 24).unbind()
    assert torch.equal(attend_packed(q, k, v, None, [1] * 9, 3), v)


@pytest.mark.parametrize("rows", [5, 20, 300])
@pytest.mark.parametrize("number", [nan, inf, -inf, 1e30])
@pytest.mark.parametrize("where", range(4))
def test_nan_and_infinities_come_through_as_in_torch(kernels, rows, number, where):
    lengths, (q, k, v) = [rows, 40], drawn(1, 3, rows + 40, 32).unbind()
    bias = torch.zeros(rows + 40)
    (q, k, v, bias[:, None])[where][2, 0] = number
    answer = attend_packed(q, k, v, bias, lengths, 2)
    close(answer, by_torch(q, k, v, bias, lengths, 2))
    close(answer[rows:], by_torch(q[rows:], k[rows:], v[rows:], None, [40], 2))


@pytest.mark.parametrize("rows", [3, 40, 300])
def test_nobody_to_attend_to_is_nothing(kernels, rows):
    """As torch answers, where every key is shut out."""
    q, k, v = drawn(1, 3, rows, 32).unbind()
    shut = torch.full((rows,), -inf)
    theirs = functional.scaled_dot_product_attention(
        q[None, None], k[None, None], v[None, None], shut[None, None, None]
    )
    assert torch.equal(theirs[0, 0], torch.zeros(rows, 32))
    assert torch.equal(attend_packed(q, k, v, shut, [rows], 1), theirs[0, 0])
    shut[-1] = 0  # all keys of the first blocks are shut out
    close(attend_packed(q, k, v, shut, [rows], 1), v[-1:].expand(rows, 32))


def test_samples_do_not_see_each_other_nor_the_threads(kernels):
    lengths = [31, 0, 200, 7, 270, 64] * 3
    q, k, v = drawn(1, sum(lengths), 3 * 96).chunk(3, -1)
    parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
    alone = torch.cat([attend_packed(*of, None, [of[0].shape[0]], 3) for of in parts])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 100):
            torch.set_num_threads(threads)
            assert torch.equal(attend_packed(q, k, v, None, lengths, 3), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1, 7, 16, 24, 33, 64])
def test_nothing_is_read_beyond_the_arrays(kernels, fence, size):
    lengths = [5, 0, 40, 1]
    q, k, v = (fence(drawn(i, 46, 2 * size)) for i in range(3))
    bias = fence(drawn(3, 46))
    close(attend_packed(q, k, v, bias, lengths, 2), by_torch(q, k, v, bias, lengths, 2))


def test_what_does_not_fit_together_is_refused(kernels):
    q = torch.ones(5, 6)
    for lengths in ([4], [6], [7, -2]):
        with pytest.raises(ValueError, match="samples of other rows"):
            attend_packed(q, q, q, None, lengths, 2)
    for of, bias, heads in (
        ((q, q[:4], q), None, 2),
        ((q, q, q[:, :5]), None, 2),
        ((q, q, q.double()), None, 2),
        ((q, q, q), torch.ones(4), 2),
        ((q, q, q), None, 4),
        ((q, q, q), None, 0),
    ):
        with pytest.raises(ValueError, match="native kernel got"):
            attend_packed(*of, bias, [5], heads)


def test_shapes_are_known_without_values():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.ones(5, 6)
        assert attend_packed(x, x, x, None, [2, 3], 2).shape == (5, 6)


@pytest.mark.parametrize("lengths", [(5, 0, 9), (7, 7), (14,)])
def test_packed_tokens_take_one_call(kernels, lengths, monkeypatch):
    chosen, calls = library.chosen(), []
    monkeypatch.setattr(chosen, "attend", lambda *a, kernel=chosen.attend: (calls.append(1), kernel(*a))[1])
    q, k, v = drawn(1, 14, 3 * 24).chunk(3, -1)
    for size in (None, 1 + drawn(2, 14).abs()):
        del calls[:]
        tokens = Tokens(q, lengths=lengths, size=size)
        with CountMacs() as native:
            answer = attend(q, k, v, tokens, 2)
        assert calls
        with library.using(""), CountMacs() as plain:
            expected = attend(q, k, v, tokens, 2)
        close(answer, expected)
        assert len(calls) == 1 and native.total == plain.total
        wanted = q.clone().requires_grad_()
        close(attend(wanted, k, v, tokens, 2), expected)
        close(attend(*(t.double() for t in (q, k, v)), tokens, 2).float(), expected)
        assert len(calls) == 1, "gradients and other dtypes stay with torch"


@quick
@hypothesis.given(st.lists(st.integers(0, 40), max_size=5), st.integers(1, 70), st.booleans())
def test_the_mean_is_that_of_every_sample(kernels, lengths, width, apart):
    x = drawn(1, width, sum(lengths)).t() if apart else drawn(1, sum(lengths), width)
    means = mean_packed(x, lengths)
    assert means.shape == (len(lengths), width)
    if lengths:
        close(means, torch.stack([part.double().mean(0) for part in x.split(lengths)]))


def test_a_mean_of_other_rows_is_refused(kernels):
    for x, lengths in ((drawn(1, 4, 3), [2, 1]), (drawn(1, 4, 3), [5, -1]), (drawn(1, 4, 3).double(), [4])):
        with pytest.raises(ValueError, match="a native kernel got"):
            mean_packed(x, lengths)
