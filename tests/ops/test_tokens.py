import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynanet.ops.tokens import (
    TOKEN_ROWS,
    Tokens,
    attend,
    class_attention,
    first_rows,
    rank,
    sample_of_row,
    spread_rows,
    sum_by_sample,
    summed_key,
)

D, HEADS = 8, 2
presence = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rectangle(samples, tokens):
    return [torch.randn(samples, tokens, D, dtype=torch.float64) for _ in range(3)]


def by_hand(q, k, v, alive):
    """Softmax attention, sample by sample and head by head, among the tokens that are there; (tokens there, D)."""
    answers = []
    for b in range(q.shape[0]):
        there = alive[b] > 0
        heads = []
        for h in range(HEADS):
            part = slice(h * D // HEADS, (h + 1) * D // HEADS)
            weights = (q[b, there, part] @ k[b, there, part].T / (D // HEADS) ** 0.5).softmax(-1)
            heads.append(weights @ v[b, there, part])
        answers.append(torch.cat(heads, -1))
    return torch.cat(answers)


@given(presence)
@settings(max_examples=40, deadline=None)
def test_packed_attention_is_masked_attention(there):
    """Ragged, equal lengths, one token, no token in a sample, no token at all."""
    alive = torch.tensor(there, dtype=torch.float64)
    q, k, v = rectangle(len(there), 5)
    index = alive.flatten().nonzero().squeeze(1)
    packed = TOKEN_ROWS.take(Tokens(q), alive.shape, index)
    assert packed.lengths == tuple(alive.sum(1).int().tolist())
    answer = attend(*(z.flatten(0, 1)[index] for z in (q, k, v)), packed, HEADS)
    expected = by_hand(q, k, v, alive)
    assert torch.allclose(answer, expected, rtol=1e-12, atol=1e-12)
    for mask in (alive, alive.clone().requires_grad_()):
        dense = attend(q, k, v, Tokens(q, alive=mask), HEADS)
        assert torch.allclose(dense[alive > 0], expected, rtol=1e-12, atol=1e-12)
        assert dense.isfinite().all(), "a sample without tokens must not spread NaN"


def test_all_tokens_are_there_unless_said_otherwise():
    q, k, v = rectangle(3, 4)
    expected = by_hand(q, k, v, torch.ones(3, 4)).reshape(3, 4, D)
    assert torch.allclose(attend(q, k, v, Tokens(q), HEADS), expected)
    packed = Tokens(q.flatten(0, 1), lengths=(4, 4, 4))
    assert torch.allclose(attend(*(z.flatten(0, 1) for z in (q, k, v)), packed, HEADS), expected.flatten(0, 1))


def test_a_soft_presence_weighs_a_token_as_a_key_and_hears_of_it():
    """With presence a, a token counts as if its exponential were a times as large."""
    q, k, v = rectangle(1, 2)
    alive = torch.tensor([[1.0, 0.3]], dtype=torch.float64, requires_grad=True)
    answer = attend(q, k, v, Tokens(q, alive=alive), heads=1)
    weights = (q[0] @ k[0].T / D**0.5).exp() * torch.tensor([1.0, 0.3])
    assert torch.allclose(answer[0], weights / weights.sum(1, keepdim=True) @ v[0])
    answer.sum().backward()
    assert (alive.grad != 0).all()


@given(presence, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_tokens_leave_and_come_home_at_every_depth(there, seed):
    """Taken from the rectangle, then once more from the packed tokens; home again both times."""
    torch.manual_seed(seed)
    alive = torch.tensor(there, dtype=torch.float64)
    x, lead = torch.randn(len(there), 5, D), alive.shape
    index = alive.flatten().nonzero().squeeze(1)
    once = TOKEN_ROWS.take(Tokens(x), lead, index)
    inner = (torch.rand(index.numel()) < 0.5).double()
    again = TOKEN_ROWS.take(once, (index.numel(),), inner.nonzero().squeeze(1))
    survives = alive.flatten().index_copy(0, index, inner).reshape(lead)
    assert again.lengths == tuple(survives.sum(1).int().tolist())
    assert torch.equal(again.x, x[survives > 0])
    middle = TOKEN_ROWS.put(again.x + 1, (index.numel(),), inner.nonzero().squeeze(1), otherwise=once.x)
    home = TOKEN_ROWS.put(middle, lead, index, otherwise=x)
    assert torch.equal(home, x + survives[..., None].float())


@given(presence)
@settings(max_examples=20, deadline=None)
def test_putting_is_masking_for_hard_keeps(there):
    keep = torch.tensor(there, dtype=torch.float64)
    x, y, _ = rectangle(len(there), 5)
    index = keep.flatten().nonzero().squeeze(1)
    put = TOKEN_ROWS.put(y.flatten(0, 1)[index], keep.shape, index, otherwise=x)
    assert torch.equal(put, TOKEN_ROWS.mask(y, keep.shape, keep.flatten(), otherwise=x))


def test_the_first_token_of_every_sample_is_marked():
    assert Tokens(torch.zeros(2, 3, D)).first().tolist() == [[1, 0, 0], [1, 0, 0]]
    for lengths, first in (
        ((2, 3), [1, 0, 1, 0, 0]),
        ((0, 2, 0, 1, 0), [1, 0, 1]),
        ((0, 0), []),
        ((), []),
    ):
        assert Tokens(torch.zeros(sum(lengths), D), lengths=lengths).first().tolist() == first
    assert Tokens(torch.zeros(0, 3, D)).first().shape == (0, 3)


def test_nobody_to_attend_to():
    nothing = torch.zeros(0, D)
    for lengths in ((), (0,), (0, 0)):
        assert attend(nothing, nothing, nothing, Tokens(nothing, lengths=lengths), HEADS).shape == (0, D)
    empty = torch.zeros(0, 3, D)
    assert attend(empty, empty, empty, Tokens(empty), HEADS).shape == (0, 3, D)


def both_layouts(there):
    """The same random tokens with gaps in a rectangle, and packed; and how to bring rows of the first to the second."""
    alive = torch.tensor(there, dtype=torch.float64)
    x = torch.randn(*alive.shape, D, dtype=torch.float64)
    index = alive.flatten().nonzero().squeeze(1)
    packed = Tokens(x.flatten(0, 1)[index], lengths=tuple(alive.sum(1).int().tolist()))
    return Tokens(x, alive=alive), packed, lambda t: t.flatten(0, 1)[index]


@given(presence)
@settings(max_examples=30, deadline=None)
def test_ranks_are_places_in_the_sample(there):
    rectangle, packed, rows = both_layouts(there)
    score = rectangle.x[..., 0].clone()
    score[:, 1] = score[:, 2]  # equal scores: the earlier is lower
    score[:, 3] = torch.inf
    ranks, count = rank(score, rectangle)
    for b, present in enumerate(there):
        mine = [t for t in range(5) if present[t]]
        expected = sorted(mine, key=lambda t: (score[b, t], t))
        assert [ranks[b, t] for t in mine] == [expected.index(t) for t in mine]
        assert (count[b] == len(mine)).all()
    ranks_packed, count_packed = rank(rows(score), packed)
    assert torch.equal(ranks_packed, rows(ranks)) and torch.equal(count_packed, rows(count))


@given(presence)
@settings(max_examples=30, deadline=None)
def test_the_attention_of_the_class_token_is_the_first_row_of_the_attention(there):
    there = [[True, *present[1:]] for present in there]
    rectangle, packed, rows = both_layouts(there)
    q, k = torch.randn(2, *rectangle.x.shape, dtype=torch.float64)
    attention = class_attention(q, k, rectangle, HEADS)
    for b, alive in enumerate(rectangle.alive):
        present = alive > 0
        parts = [slice(h * D // HEADS, (h + 1) * D // HEADS) for h in range(HEADS)]
        weights = [(k[b, present][:, p] @ q[b, 0, p] / (D / HEADS) ** 0.5).softmax(0) for p in parts]
        torch.testing.assert_close(attention[b, present], torch.stack(weights).mean(0))
        assert (attention[b, ~present] == 0).all()
    torch.testing.assert_close(class_attention(rows(q), rows(k), packed, HEADS), rows(attention))


def test_a_token_of_size_three_is_attended_to_as_three_equal_ones():
    q, k, v = rectangle(2, 4)
    size = torch.tensor([[1.0, 3, 1, 1], [1, 1, 2, 1]], dtype=torch.float64)
    grown = [torch.cat([z[b].repeat_interleave(size[b].long(), 0) for b in range(2)]) for z in (q, k, v)]
    expected = attend(*grown, Tokens(grown[0], lengths=(6, 5)), HEADS)
    starts = [[0, 1, 4, 5], [6, 7, 8, 10]]
    alive = torch.ones(2, 4, dtype=torch.float64)
    for tokens in (
        Tokens(q, size=size),
        Tokens(q, alive=alive, size=size),
        Tokens(q, alive=alive.clone().requires_grad_(), size=size),
    ):
        torch.testing.assert_close(attend(q, k, v, tokens, HEADS), expected[torch.tensor(starts)])
    flat = [z.flatten(0, 1) for z in (q, k, v)]
    packed = Tokens(flat[0], lengths=(4, 4), size=size.flatten())
    torch.testing.assert_close(attend(*flat, packed, HEADS), expected[torch.tensor(starts).flatten()])
    fewer = [z[:7] for z in flat]  # of unequal lengths: sample by sample
    torch.testing.assert_close(
        attend(*fewer, Tokens(fewer[0], lengths=(4, 3), size=size.flatten()[:7]), HEADS)[:4], expected[starts[0]]
    )
    assert class_attention(q, k, Tokens(q, size=size), HEADS)[0, 1] == pytest.approx(
        class_attention(grown[0][None, :6], grown[1][None, :6], Tokens(grown[0][None, :6]), HEADS)[0, 1:4].sum().item()
    )


@given(presence)
@settings(max_examples=20, deadline=None)
def test_sums_and_firsts_of_every_sample(there):
    rectangle, packed, _ = both_layouts(there)
    expected = (rectangle.x * rectangle.alive[..., None]).sum(1)
    torch.testing.assert_close(sum_by_sample(packed.x, packed), expected)
    spread = spread_rows(expected, packed)
    assert torch.equal(spread, expected[sample_of_row(packed.lengths, packed.x.device)])
    first = [next((rectangle.x[b, t] for t in range(5) if row[t]), torch.zeros(D)) for b, row in enumerate(there)]
    assert torch.equal(first_rows(packed.x, packed), torch.stack(first).double())


def test_the_summed_key_points_where_the_mean_does():
    key = torch.randn(3, 5, D)
    mean = key.unflatten(-1, (HEADS, -1)).mean(-2)
    torch.testing.assert_close(summed_key(key, HEADS), HEADS * mean)


def test_what_travels_with_tokens_leaves_with_them():
    x = torch.arange(12.0).view(2, 3, 2)
    tokens = Tokens(x, size=x[..., 0], key=x + 1)
    taken, other = TOKEN_ROWS.take((tokens, x[..., 1]), (2, 3), torch.tensor([0, 4, 5]))
    assert taken.lengths == (1, 2) and taken.alive is None
    assert taken.size.tolist() == [0, 8, 10] and torch.equal(taken.key, taken.x + 1)
    assert other.tolist() == [1, 9, 11]
    everything = TOKEN_ROWS.take(tokens, (2, 3), torch.arange(6))
    assert everything.lengths == (3, 3) and everything.x.data_ptr() == x.data_ptr(), "all tokens are no copy"
