"""CALM's three measures, on scales that order as the paper's do and do not saturate."""

import pytest
import torch
from torch.nn import functional

from dynanet.generate.token_confidence import LearnedToken, Saturation, SoftmaxGap, consistency_loss


def features(rows=40, width=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_gap_orders_as_probabilities_do(share):
    logits = 4 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = logits.softmax(-1).topk(2).values
    gap, score = best[:, 0] - best[:, 1], SoftmaxGap()(logits, logits, logits)
    assert torch.equal(score >= SoftmaxGap().level(share), gap >= share)
    torch.testing.assert_close(1 - (-score).exp(), gap)


def test_the_gap_does_not_saturate():
    logits = torch.tensor([[40.0, 0, 0], [50.0, 0, 0]])
    score = SoftmaxGap()(logits, logits, logits)
    assert torch.isfinite(score).all() and score[1] > score[0]
    assert (logits.softmax(-1).amax(-1) == 1).all()


def test_saturation_is_the_cosine():
    x, before = features()
    before = x + 0.5 * before
    cosine, score = functional.cosine_similarity(x, before), Saturation()(x, x, before)
    torch.testing.assert_close(1 - 2 * (-score).exp(), cosine)
    assert torch.equal(score >= Saturation().level(0.9), cosine >= 0.9)
    assert torch.isfinite(Saturation()(x, x, x)).all()


def test_a_learned_one_learns_what_agrees():
    """At the first exit, features say whether it agrees with the last."""
    x, _ = features(300)
    x = x.float()
    last = functional.one_hot(torch.zeros(300, dtype=torch.int64), 3).float()
    agrees = x[:, 0] > 0
    early = functional.one_hot(torch.where(agrees, 0, 1), 3).float()
    confidence = LearnedToken(6)
    optimizer = torch.optim.Adam(confidence.parameters(), 0.2)
    for _ in range(80):
        loss = consistency_loss(confidence, [(early, x, x), (last, x, x)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((confidence(early, x, x) > confidence.level(0.5)) == agrees).float().mean() > 0.95


@pytest.mark.parametrize("confidence", [SoftmaxGap(), Saturation(), LearnedToken(6)])
def test_a_threshold_of_one_is_never(confidence):
    assert confidence.level(1.0) == float("inf")
    assert confidence.level(0.9) > confidence.level(0.1)
