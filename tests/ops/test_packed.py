"""Samples of different lengths leave and join, each with its own tokens."""

import torch

from dynanet.ops.packed import PACKED_ROWS, Packed, pack


def packed(*counts):
    x = torch.arange(len(counts) * 5 * 2.0).reshape(len(counts), 5, 2)
    return x, pack(x, torch.tensor(counts, dtype=torch.int64))


def test_packing_keeps_what_is_there_in_order():
    x, p = packed(2, 5, 1)
    torch.testing.assert_close(p.x, torch.cat([x[0, :2], x[1], x[2, :1]]))
    assert p.tokens().lengths == (2, 5, 1)
    assert p.there().sum(1).tolist() == [2, 5, 1] and p.there()[0].tolist() == [1, 1, 0, 0, 0]


def test_the_mean_is_over_the_tokens_of_a_sample():
    x, p = packed(2, 5, 1)
    torch.testing.assert_close(p.mean(), torch.stack([x[0, :2].mean(0), x[1].mean(0), x[2, 0]]))
    torch.testing.assert_close(pack(x[1:2], torch.tensor([5])).mean(), x[1:2].mean(1))
    assert pack(x[:0], torch.zeros(0, dtype=torch.int64)).mean().shape == (0, 2)


def test_the_mean_of_nothing_and_beside_strangers():
    x = torch.randn(3, 5, 4)
    x[1] = torch.nan
    mean = pack(x, torch.tensor([2, 3, 0])).mean()
    torch.testing.assert_close(mean[0], x[0, :2].mean(0))
    assert mean[1:].isnan().all(), "of no numbers there is no mean"
    double = x[::2].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pack(x, torch.tensor([4, 5])).mean(), double)


def test_samples_leave_with_their_tokens_and_what_travels_with_them():
    x, p = packed(2, 5, 1)
    memory = torch.tensor([[7], [8], [9]])
    (taken, left), note = PACKED_ROWS.take(((p, memory), None), (3,), torch.tensor([2, 0]))
    assert isinstance(taken, Packed) and note is None
    torch.testing.assert_close(taken.x, torch.cat([x[2, :1], x[0, :2]]))
    assert taken.counts.tolist() == [1, 2] and left.flatten().tolist() == [9, 7] and taken.width == 5


def test_nobody_leaves_and_nothing_is_copied():
    _, p = packed(2, 5, 1)
    assert PACKED_ROWS.take(p, (3,), torch.arange(3)) is p


def test_everybody_leaves():
    _, p = packed(2, 5, 1)
    taken = PACKED_ROWS.take(p, (3,), torch.arange(0))
    assert taken.x.shape == (0, 2) and taken.counts.shape == (0,)


def test_answers_come_home_by_sample():
    home = PACKED_ROWS.put(torch.ones(2, 4), (3,), torch.tensor([0, 2]), torch.zeros(3, 4))
    assert home[:, 0].tolist() == [1, 0, 1]
