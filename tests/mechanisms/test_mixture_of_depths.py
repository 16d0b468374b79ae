"""The highest of a sequence run in training; a predictor decides alone when the future is not known."""

import pytest
import torch

from dynanet import execute, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.mechanisms.mixture_of_depths import MixtureOfDepths, PredictTopTokens, causal_predictor
from dynanet.ops.tokens import Tokens
from dynanet.zoo.causal_transformers import Block

D = 8


def layer(capacity=0.5, predictor=False):
    torch.manual_seed(0)
    return MixtureOfDepths(
        Block(D, 2, 16, 0.0), D, capacity=capacity, predictor=causal_predictor(D, 4) if predictor else None
    )


def kept(model, tokens):
    with torch.no_grad(), record(model) as trace:
        answer = model(tokens)
    return trace[""][0][..., 0], answer.x


def test_the_highest_run_and_the_others_pass_by():
    model, x = layer(0.3), torch.randn(3, 7, D)
    for mode in (model.train(), execute(model.eval(), sparse=True)):
        keep, answer = kept(mode, Tokens(x))
        weight = model.router(x)[..., 0].detach()
        assert keep.sum(1).tolist() == [3, 3, 3], "0.3 of 7, rounded up"
        for b in range(3):
            assert set(keep[b].nonzero().flatten().tolist()) == set(weight[b].topk(3).indices.tolist())
        assert torch.equal(answer[keep == 0], x[keep == 0])
        assert (answer[keep == 1] - x[keep == 1]).abs().amin(1).gt(0).any()


def test_the_answer_is_weighted_by_the_router():
    """Equation 1 of the paper, for the tokens that were kept, written out."""
    model, x = layer(1.0).eval(), torch.randn(2, 5, D)
    _, answer = kept(model, Tokens(x))
    with torch.no_grad():
        expected = x + model.router(x) * (model.block(Tokens(x)).x - x)
    torch.testing.assert_close(answer, expected)


def test_every_sequence_keeps_its_own_share():
    model, x = layer(0.5).eval(), torch.randn(2, 6, D)
    alive = torch.tensor([[1.0] * 6, [1, 1, 1, 0, 0, 0]])
    keep, _ = kept(model, Tokens(x, alive))
    assert keep.sum(1).tolist() == [3, 2] and not (keep * (1 - alive)).any()


def test_a_predictor_does_not_look_ahead():
    model, x = layer(0.5, predictor=True), torch.randn(4, 9, D)
    later = x.clone()
    later[:, 5:] += 3 * torch.randn(4, 4, D)
    for sparse in (False, True):
        execute(model.eval(), sparse=sparse)
        (keep, answer), (keep_later, answer_later) = kept(model, Tokens(x)), kept(model, Tokens(later))
        assert torch.equal(keep[:, :5], keep_later[:, :5])
        torch.testing.assert_close(answer[:, :5], answer_later[:, :5])
    top = layer(0.5).eval()
    assert not torch.equal(kept(top, Tokens(x))[0][:, :5], kept(top, Tokens(later))[0][:, :5]), "top tokens do look"


def test_the_predictor_learns_which_tokens_are_highest():
    model, x = layer(0.25, predictor=True).train(), torch.randn(16, 12, D)
    optimizer, objective, losses = torch.optim.Adam(model.parameters(), 0.03), PredictTopTokens(), []
    for _ in range(60):
        with record(model) as trace:
            answer = model(Tokens(x))
        losses.append(objective(answer.x, None, trace))
        optimizer.zero_grad()
        losses[-1].backward()
        assert model.router.weight.grad is None and all(p.grad is None for p in model.block.parameters())
        optimizer.step()
    with torch.no_grad():
        top = kept(model, Tokens(x))[0]
        said = kept(model.eval(), Tokens(x))[0]
    assert losses[-1] < 0.6 * losses[0]
    assert (top == said).float().mean() > 0.85


def test_padding_is_no_token_to_predict():
    model, x = layer(0.5, predictor=True).train(), torch.randn(2, 6, D)
    with record(model) as cut:
        model(Tokens(x[:, :4]))
    with record(model) as padded:
        model(Tokens(x, (torch.arange(6) < 4).float().expand(2, 6)))
    torch.testing.assert_close(PredictTopTokens()(None, None, padded), PredictTopTokens()(None, None, cut))


def test_the_router_learns_from_the_answer():
    model = layer().train()
    model(Tokens(torch.randn(3, 5, D))).x.square().sum().backward()
    assert model.router.weight.grad.abs().sum() > 0


def test_what_makes_no_sense():
    for capacity in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="capacity"):
            layer(capacity)
    model = layer()
    with record(model) as trace:
        model(Tokens(torch.randn(2, 3, D)))
    with pytest.raises(StructureError, match="with a predictor"):
        PredictTopTokens()(None, None, trace)
