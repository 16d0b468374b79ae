"""A causal transformer does not look ahead, and learns at every exit."""

import pytest
import torch

from dynanet.core.errors import ConfigError, InputError
from dynanet.zoo.causal_transformers import causal_transformer, exits_loss


def small(**more):
    torch.manual_seed(0)
    sizes = {"vocabulary": 11, "width": 16, "heads": 2, "hidden": 32, "depth": 4, "exits": (0, 1, 3), "longest": 20}
    return causal_transformer(**sizes | more)


def test_it_does_not_look_ahead():
    model, ids = small().eval(), torch.randint(11, (3, 12))
    other = ids.clone()
    other[:, 7:] = torch.randint(11, (3, 5))
    with torch.no_grad():
        for a, b in zip(model.answers(ids), model.answers(other), strict=True):
            torch.testing.assert_close(a[:, :7], b[:, :7])
            assert not torch.allclose(a[:, 8:], b[:, 8:])


def test_every_exit_learns():
    model, ids = small(), torch.arange(60).reshape(4, 15) % 11
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        loss = exits_loss(model.train().answers(ids[:, :-1]), ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for logits in model.eval().answers(ids[:, :-1]):
        assert (logits.argmax(-1) == ids[:, 1:]).float().mean() > 0.95


def test_later_exits_count_more():
    targets = torch.zeros(1, 2, dtype=torch.int64)
    good, bad = torch.tensor([20.0, 0, 0]).expand(1, 2, 3), torch.tensor([0.0, 20, 0]).expand(1, 2, 3)
    assert exits_loss([good, bad], targets).item() == pytest.approx(20 * 2 / 3, rel=1e-3)
    assert exits_loss([bad, good], targets).item() == pytest.approx(20 / 3, rel=1e-3)


def test_layers_are_dropped_in_training_only_and_deep_ones_more():
    model = small(layer_dropout=0.9, depth=4, exits=(3,))
    ids = torch.randint(11, (400, 5))
    x, y = torch.zeros(4000, 1, 1), torch.ones(4000, 1, 1)
    rates = [1 - model.train()._dropped(layer, x, y).mean().item() for layer in range(4)]
    assert rates[0] == 0 and rates == sorted(rates) and rates[3] == pytest.approx(0.9, abs=0.03)
    with torch.no_grad():
        assert not torch.equal(model(ids), model(ids))
        assert torch.equal(model.eval()(ids), model(ids))


@pytest.mark.parametrize("wrong, said", [
    ({"heads": 3}, "width must be a multiple of heads = 3"), ({"exits": (0, 1)}, "exits must be ascending"),
    ({"depth": 0}, "depth must be at least 1, got 0"), ({"layer_dropout": 1.0}, "layer_dropout must be .* 1.0"),
])  # fmt: skip
def test_sizes_that_mean_nothing(wrong, said):
    with pytest.raises(ConfigError, match=said):
        small(**wrong)


@pytest.mark.parametrize("ids, said", [
    (torch.zeros(2, 21, dtype=torch.int64), "longest"), (torch.zeros(3), "int64"), (torch.tensor([[11]]), "vocabulary"),
])  # fmt: skip
def test_input_that_cannot_be_read(ids, said):
    with pytest.raises(InputError, match=said):
        small()(ids)
