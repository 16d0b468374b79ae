"""What the laws do not say of neuron skip: which way the sparse form takes, and what a trained FFN becomes."""

import pytest
import torch
from torch import nn

from dynanet import convert
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import StraightThrough, TopK
from dynanet.mechanisms.neuron_skip import LowRankScorer, NeuronSkip, moefy

D, HIDDEN, BLOCK = 10, 32, 4
BLOCKS = HIDDEN // BLOCK


def layer(rule=None, *, bias=True, out=D, activation=None):
    torch.manual_seed(0)
    gate = Gate(LowRankScorer(D, BLOCKS, 4, bias=0.0), rule or TopK(3), units=BLOCKS)
    up, down = nn.Linear(D, HIDDEN, bias=bias), nn.Linear(HIDDEN, out, bias=bias)
    return NeuronSkip(up, down, gate, activation=activation, block=BLOCK).double().eval()


def ffn():
    torch.manual_seed(1)
    return nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, 7)


@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_every_way_answers_the_same(rows, bias, grad):
    model, x = layer(bias=bias, out=7, activation=nn.Sigmoid()), torch.randn(rows, D, dtype=torch.float64)
    with torch.set_grad_enabled(grad):  # products are added up in place where no gradient is wanted
        dense, sparse = (execute(model, sparse=sparse)(x) for sparse in (False, True))
    assert dense.shape == (rows, 7)
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep", [[0] * 8, [1] * 8, [1, 0, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 0, 0, 1, 0]])
def test_rows_that_agree_run_together(keep):
    model, x = layer(), torch.randn(6, D, dtype=torch.float64)
    with forced(model, lambda decision: torch.tensor(keep).expand_as(decision.keep)):
        expected = execute(model, sparse=False)(x)
        with torch.no_grad(), CountMacs() as count:
            torch.testing.assert_close(execute(model, sparse=True)(x), expected, rtol=1e-12, atol=1e-12)
    gate = 6 * 4 * (D + BLOCKS)
    assert count.total - gate == 6 * sum(keep) * BLOCK * 2 * D


def test_one_decision_per_sample_for_all_its_tokens():
    class OfTheMean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(D, BLOCKS)

        def forward(self, x_BTD):
            return self.map(x_BTD.mean(1))

    torch.manual_seed(0)
    gate = Gate(OfTheMean(), StraightThrough(), units=BLOCKS)
    model = NeuronSkip(nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D), gate, block=BLOCK).eval()
    x = torch.randn(3, 9, D)
    cost = CostModel(model, x)
    with torch.no_grad(), record(execute(model, sparse=True)) as trace:
        model(x)
    assert trace[""][0].shape == (3, BLOCKS)
    assert cost.unit[""].tolist() == [9 * BLOCK * 2 * D] * BLOCKS
    assert 0 < trace[""][0].mean() < 1


def test_a_gate_for_other_rows_is_refused():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.new_ones(5, BLOCKS)

    model = NeuronSkip(*ffn(), Gate(Fixed(), TopK(1), units=BLOCKS), block=BLOCK)
    with pytest.raises(StructureError, match="expected leading axes"):
        model(torch.randn(4, D))


@pytest.mark.parametrize(
    ("hidden", "block", "units", "what"),
    [(31, 4, 8, "fit|takes"), (32, 5, 8, "divisor"), (32, 0, 8, "divisor"), (32, 4, 7, "7 units")],
)
def test_what_does_not_fit_is_refused_at_once(hidden, block, units, what):
    gate = Gate(LowRankScorer(D, units), TopK(1), units=units)
    with pytest.raises(StructureError, match=what):
        NeuronSkip(nn.Linear(D, HIDDEN), nn.Linear(hidden, D), gate, block=block)


def test_a_gate_learns_within_a_converted_network():
    static = nn.Sequential(nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D)), nn.Linear(D, 2))

    def skip(f):
        gate = Gate(LowRankScorer(D, BLOCKS), StraightThrough(), units=BLOCKS)
        return NeuronSkip(f[0], f[2], gate, activation=f[1], block=BLOCK)

    model, x = convert(static, {"0": skip}), torch.randn(5, D)
    with forced(model.eval(), everything):
        torch.testing.assert_close(model(x), static(x))
    cost = CostModel(model, x)
    with record(model.train()) as trace:
        model(x)
    cost.spent(trace).sum().backward()
    assert model[0].gate.scorer.inner.weight.grad.abs().sum() > 0


def test_a_moefied_ffn_with_everything_kept_is_the_ffn():
    up, down = (part.double() for part in ffn())
    x = torch.randn(64, D, dtype=torch.float64)
    before = up.weight.clone()
    model = moefy(up, down, x, keep=BLOCKS, block=BLOCK, rank=4).eval()
    for sparse in (False, True):
        torch.testing.assert_close(execute(model, sparse=sparse)(x), down(up(x).relu()), rtol=1e-12, atol=1e-12)
    assert torch.equal(up.weight, before)


def test_a_fitted_router_misses_less_than_a_random_one():
    up, down = ffn()
    with torch.no_grad():  # neurons that fire in groups: each group looks at an input of its own, in shuffled places
        up.weight.copy_(torch.eye(D)[torch.arange(BLOCKS).repeat(BLOCK)] + 0.1 * torch.randn(HIDDEN, D))
        up.bias.fill_(-0.5)
    x, new = torch.randn(512, D), torch.randn(256, D)
    model = moefy(up, down, x, keep=3, block=BLOCK, rank=8).eval()
    with torch.no_grad():
        exact, routed = down(up(new).relu()), model(new)
        model.gate.scorer.outer.weight.normal_()
        random = model(new)
    assert (routed - exact).square().mean() < 0.5 * (random - exact).square().mean()


def test_what_moefy_cannot_do():
    up, down = ffn()
    with pytest.raises(StructureError, match="divisor"):
        moefy(up, down, torch.randn(9, D), keep=2, block=5)
    with pytest.raises(ConfigError, match="from 1 to 8.*keep = 9"):
        moefy(up, down, torch.randn(9, D), keep=9, block=4)
