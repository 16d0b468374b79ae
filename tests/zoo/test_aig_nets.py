import pytest
import torch

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, layers, record
from dynanet.core.errors import ConfigError
from dynanet.nets.resnet import cifar_resnet
from dynanet.testing import check_equal, check_neighbours
from dynanet.train import TargetRate
from dynanet.zoo import convnet_aig, convnet_aig_cifar
from dynanet.zoo.aig_nets import target_rates

SMALL = {"num_classes": 10, "depth": 14, "widths": (4, 8, 8)}


def test_the_laws_of_the_whole_net(seeded, seeded_input):
    model, x = seeded(convnet_aig_cifar(**SMALL, always=(0, 5))), seeded_input((3, 3, 16, 16))
    for layer in layers(model).values():
        layer.gate.scorer[-1].bias.data.zero_()
    check_equal(model, x, draws=2)
    check_neighbours(model, x)


def test_with_every_layer_kept_it_is_the_resnet(seeded, seeded_input):
    model, x = seeded(convnet_aig_cifar(**SMALL, always=(1,))), seeded_input((2, 3, 16, 16))
    static = cifar_resnet(**SMALL)
    own = [t for name, t in model.state_dict().items() if "gate" not in name]
    static.load_state_dict(dict(zip(static.state_dict(), own, strict=True)))
    with torch.no_grad(), forced(model, lambda d: torch.ones_like(d.keep)):
        torch.testing.assert_close(static.eval()(x), model(x))


def test_the_authors_nets():
    with torch.device("meta"):
        assert len(layers(convnet_aig(depth=50))) == 16  # a gate per layer, as in the authors' code
        assert len(layers(convnet_aig(depth=101))) == 33
        assert len(layers(convnet_aig_cifar(num_classes=10))) == 54
        assert len(layers(convnet_aig(depth=50, always=(0, 3, 7)))) == 13


def test_shortcuts_that_are_convolutions_run_once_and_always():
    torch.manual_seed(0)
    model, x = convnet_aig(num_classes=7, depth=50).eval(), torch.randn(2, 3, 32, 32)
    cost = CostModel(model, x[:1])
    assert cost.worst == cost.full  # nothing is computed twice
    first = layers(model)["1"]
    with torch.no_grad(), forced(execute(first, sparse=True), lambda d: 0 * d.keep):
        h = model[0](x)
        torch.testing.assert_close(first(h), first.shortcut(h).relu())


def test_gates_start_open():
    torch.manual_seed(0)
    model = convnet_aig_cifar(num_classes=10, depth=14).train()
    with record(model) as trace:
        model(torch.randn(64, 3, 16, 16))
    rate = torch.cat([call.keep for call in trace.calls]).mean().item()
    assert rate == pytest.approx(0.87, abs=0.06)


def test_a_rate_per_layer():
    model = convnet_aig_cifar(**SMALL, always=(0,)).train()
    rates = target_rates(model, 0.4, first=2, others=0.9)
    assert list(rates) == ["2", "3", "4", "5", "6"] and list(rates.values()) == [0.9, 0.9, 0.4, 0.4, 0.4]
    with record(model) as trace:
        answer = model(torch.randn(4, 3, 16, 16))
    loss = TargetRate(rates)(answer, None, trace)
    expected = sum((trace[name][0].mean() - rate) ** 2 for name, rate in rates.items())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(layer.gate.scorer[-1].bias.grad.abs() > 0 for layer in layers(model).values())


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="from 0 to 5"):
        convnet_aig_cifar(**SMALL, always=(6,))
