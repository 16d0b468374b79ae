import pytest
import torch

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, layers, record
from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.nets.resnet import cifar_resnet
from dynanet.testing import check_equal, check_neighbours
from dynanet.train.reinforce import sample_gates, sampled
from dynanet.zoo import skipnet

SMALL = {"num_classes": 10, "depth": 14, "widths": (4, 8, 8)}


def everything(decision):
    return torch.ones_like(decision.keep)


@pytest.mark.parametrize("gate", ["recurrent", "feedforward"])
def test_the_laws_of_the_whole_net(gate, seeded, seeded_input):
    model, x = seeded(skipnet(**SMALL, gate=gate, bias=0.0)), seeded_input((3, 3, 16, 16))
    check_equal(model, x, draws=2)
    check_neighbours(model, x)


@pytest.mark.parametrize("gate", ["recurrent", "feedforward"])
def test_with_every_block_kept_it_is_the_resnet(gate, seeded, seeded_input):
    model, x = seeded(skipnet(**SMALL, gate=gate)), seeded_input((2, 3, 16, 16))
    static = cifar_resnet(**SMALL)
    own = [t for name, t in model.state_dict().items() if "gate" not in name]
    static.load_state_dict(dict(zip(static.state_dict(), own, strict=True)))
    with torch.no_grad(), forced(model, everything):
        torch.testing.assert_close(static.eval()(x), model(x))


@pytest.mark.parametrize("gate, share", [("recurrent", 0.001), ("feedforward", 0.125)])
def test_resnet_110_and_the_price_of_its_gates(gate, share):
    """The paper's figures: FFGate-II 12.5 % of the blocks (one convolution of two, on a quarter of the positions)."""
    with torch.device("meta"):
        model, static = skipnet(num_classes=10, gate=gate).eval(), cifar_resnet(num_classes=10).eval()
        x = torch.empty(1, 3, 32, 32)
    with CountMacs() as plain:
        static(x)
    with CountMacs() as gated, forced(model, everything):
        model(x)
    blocks = plain.total * 53 / 54
    assert (gated.total - plain.total) / blocks == pytest.approx(share, rel=0.15 if gate == "feedforward" else 1)
    units = len(model[2].blocks) if gate == "recurrent" else len(layers(model))
    assert units == 53


def test_soft_first_then_sampled(seeded, seeded_input):
    model, x = seeded(skipnet(**SMALL, bias=0.0)), seeded_input((4, 3, 16, 16))
    with torch.no_grad():
        before = model(x)
    with record(model.train()) as trace:
        model(x)
    assert trace["2"][0].requires_grad and not sampled(trace)
    model = seeded(sample_gates(skipnet(**SMALL, bias=0.0)))
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
    with record(model.train()) as trace:
        model(x)
    assert len(sampled(trace)) == 5 and set(torch.cat(trace["2"]).unique().tolist()) <= {0.0, 1.0}


def test_it_really_skips(seeded, seeded_input):
    model, x = seeded(skipnet(**SMALL, bias=0.0)), seeded_input((5, 3, 16, 16))
    cost = CostModel(model, x[:1])
    with torch.no_grad(), CountMacs() as none, forced(execute(model, sparse=True), lambda d: 0 * d.keep):
        model(x)
    assert none.total == 5 * cost.always
    assert cost.always < 0.4 * cost.full


def test_another_gate_is_refused():
    with pytest.raises(ConfigError, match="gate must be one of 'recurrent', 'feedforward'"):
        skipnet(num_classes=10, gate="lstm")
