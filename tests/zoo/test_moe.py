import pytest
import torch
from torch import nn

from dynanet import convert, execute, record
from dynanet.core.cost import CostModel
from dynanet.core.errors import ConfigError, InputError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.expert_rules import BiasedTopK
from dynanet.gates.rules import TopK
from dynanet.mechanisms.experts import Experts
from dynanet.mechanisms.neuron_skip import LowRankScorer, NeuronSkip
from dynanet.testing import check_dynamic
from dynanet.zoo import moe_encoder, moe_vit

SMALL = {"width": 16, "depth": 2, "heads": 2, "hidden": 12, "experts": 4}


class OfNumbers(nn.Module):
    """Token numbers made of a tensor of any dtype, about a third of them padding."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((x.abs() * 3).long() % 9)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (lambda: moe_vit(num_classes=4, **SMALL, active=2, shared=1), torch.randn(3, 3, 8, 12)),
        (lambda: OfNumbers(moe_encoder(num_classes=4, vocabulary=9, **SMALL, active=1)), torch.randn(4, 6)),
    ],
    ids=["vit", "encoder"],
)
def test_laws(model, example):
    torch.manual_seed(0)
    check_dynamic(model(), example, draws=1)


def macs(model, x):
    with torch.no_grad(), CountMacs() as count:
        execute(model.eval(), sparse=True)(x)
    return count.total / len(x)


def test_the_static_net_costs_the_same_but_for_the_routers():
    x = torch.randn(2, 3, 32, 32)
    routed, static = moe_vit(num_classes=10, shared=1), moe_vit(num_classes=10, shared=1, experts=0)
    assert not any(isinstance(m, Experts) for m in static.modules())
    tokens, routers = 64, 3
    assert macs(routed, x) - macs(static, x) == routers * tokens * 96 * 8
    assert macs(static, x) == tokens * (48 * 96 + 6 * (4 * 96**2 + 2 * 64 * 96 + 2 * 96 * 3 * 192)) + 96 * 10


def test_padding_costs_no_expert_and_changes_nothing():
    torch.manual_seed(0)
    model = moe_encoder(num_classes=3, vocabulary=50, **SMALL, active=2).eval()
    ids = torch.randint(1, 50, (1, 5))
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    with torch.no_grad(), record(execute(model, sparse=True)) as trace:
        torch.testing.assert_close(model(padded), model(ids))
        assert model(torch.zeros(2, 3, dtype=torch.long)).isfinite().all()
    longer, shorter, nothing = trace["blocks.1.feed_forward"]
    assert longer.sum() == shorter.sum() == 2 * (5 + 1)
    assert nothing.sum() == 2 * 2  # of each sample the first token, which is always there


def test_images_of_any_size_that_patches_divide():
    model = moe_vit(num_classes=5, in_channels=7, patch=2, **SMALL).eval()
    assert model(torch.randn(2, 7, 6, 10)).shape == (2, 5)
    assert model(torch.randn(0, 7, 6, 10)).shape == (0, 5)
    with pytest.raises(InputError, match="7 x 10 pixels"):
        model(torch.randn(2, 7, 7, 10))


def test_positions_tell_patches_apart():
    torch.manual_seed(0)
    model, x = moe_vit(num_classes=5, **SMALL).eval(), torch.randn(1, 3, 16, 16)
    assert not torch.allclose(model(x), model(x.transpose(2, 3)), atol=1e-4)
    assert not torch.allclose(model(x), model(x.roll(4, 3)), atol=1e-4)


def test_every_nth_block_has_experts_and_biases_balance_on_request():
    model = moe_vit(num_classes=5, **{**SMALL, "depth": 6}, every=3, balance_rate=0.01)
    found = {name: m for name, m in model.named_modules() if isinstance(m, Experts)}
    assert list(found) == ["blocks.2.feed_forward", "blocks.5.feed_forward"]
    assert all(isinstance(m.gate.rule, BiasedTopK) for m in found.values())


def test_plain_blocks_can_skip_neurons():
    torch.manual_seed(0)
    static = moe_encoder(num_classes=2, vocabulary=20, **{**SMALL, "experts": 0, "hidden": 16}).eval()

    def skip(f):
        return NeuronSkip(f[0], f[2], Gate(LowRankScorer(16, 4, 2), TopK(1), units=4), activation=f[1], block=8)

    model, ids = convert(static, {r"blocks\.\d\.feed_forward": skip}), torch.randint(1, 20, (3, 7))
    spent = macs(model, ids)
    saved, gates = 2 * 8 * 3 / 4 * 2 * 16 * 32, 2 * 8 * 2 * (16 + 4)
    assert spent == macs(static, ids) - saved + gates
    with torch.no_grad(), record(model) as trace:
        model(ids)
    assert CostModel(model, ids).spent(trace).tolist() == [spent] * 3


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"active": 9}, "9 active experts of 8"),
        ({"width": 30}, "width must be a multiple of 4, got 30"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"shared": 2}, "shared"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"balance_rate": -1.0}, "balance_rate"),
    ],
)
def test_wrong_settings(settings, what):
    with pytest.raises(ConfigError, match=what):
        moe_vit(**{"num_classes": 4, **settings})


def test_wrong_token_numbers():
    model = moe_encoder(num_classes=4, vocabulary=9, longest=5, **SMALL)
    with pytest.raises(InputError, match="at most 5"):
        model(torch.ones(2, 6, dtype=torch.long))
    with pytest.raises(InputError, match="token numbers"):
        model(torch.randn(2, 3))
