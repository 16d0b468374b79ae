import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynanet.tasks.detection.boxes import area, from_sides, generalized_overlap, overlap, places, sides, suppress


def boxes(*rows):
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def test_overlaps_by_hand():
    one, other = boxes([0, 0, 4, 2]), boxes([2, 0, 6, 2], [0, 0, 4, 2], [5, 5, 6, 7], [0, 0, 0, 0])
    assert overlap(one, other).tolist() == pytest.approx([4 / 12, 1, 0, 0])
    # The third: 8 + 2 of the 42 around both.
    assert generalized_overlap(one, other).tolist() == pytest.approx([1 / 3, 1, -32 / 42, 0])
    assert area(boxes([3, 3, 1, 9])).tolist() == [0]


def test_generalized_overlap_has_a_gradient_where_nothing_overlaps():
    one = boxes([0, 0, 1, 1]).requires_grad_()
    generalized_overlap(one, boxes([4, 0, 5, 1])).sum().backward()
    assert one.grad[0, 2] > 0  # further to the right is nearer


def test_places_and_sides():
    at = places(2, 3, 8, torch.zeros(1))
    assert at.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    assert from_sides(at[:1], torch.tensor([[1.0, 2, 3, 4]])).tolist() == [[3, 2, 7, 8]]
    assert sides(torch.tensor([0.0, 1e9]), 8).isfinite().all() and sides(torch.zeros(1), 8).item() == 8


def test_the_better_of_two_stays():
    b = boxes([0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 1, 10, 11])
    scores, labels = torch.tensor([0.5, 0.9, 0.7, 0.6]), torch.tensor([0, 0, 0, 1])
    assert suppress(b, scores, labels, 0.5).tolist() == [1, 2, 3]
    assert suppress(b, scores, labels, 0.99).tolist() == [1, 2, 3, 0]
    assert suppress(b[:0], scores[:0], labels[:0], 0.5).shape == (0,)


def greedy(b, scores, labels, most):
    """The definition, box by box."""
    left, stays = scores.argsort(descending=True, stable=True).tolist(), []
    while left:
        best, *left = left
        stays.append(best)
        left = [k for k in left if labels[k] != labels[best] or overlap(b[k], b[best]) <= most]
    return stays


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 25), st.sampled_from([0.0, 0.3, 0.6, 1.0]))
def test_suppression_is_the_greedy_one(seed, count, most):
    draw = torch.Generator().manual_seed(seed)
    corner, size = 20 * torch.rand(count, 2, generator=draw), 1 + 15 * torch.rand(count, 2, generator=draw)
    b = torch.cat([corner, corner + size], 1)
    scores = torch.randint(5, (count,), generator=draw) / 5  # with ties
    labels = torch.randint(2, (count,), generator=draw)
    assert suppress(b, scores, labels, most).tolist() == greedy(b, scores, labels, most)
