import pytest
import torch
from torch import nn

import dynanet
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, layers, record
from dynanet.core.errors import StructureError
from dynanet.core.gate import Gate
from dynanet.gates.rules import StraightThrough
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.testing import check_dynamic

D = 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(D, D), nn.ReLU())

    def forward(self, x):
        return x + self.branch(x)


class Net(nn.Module):
    """Named as a ResNet is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.layer1 = nn.Sequential(*(Residual() for _ in range(3)))
        self.layer2 = nn.ModuleList(Residual() for _ in range(2))
        self.head = nn.Linear(D, 2)

    def forward(self, x):
        x = self.layer1(self.stem(x))
        for block in self.layer2:
            x = block(x)
        return self.head(x)


def skip(block):
    return LayerSkip(block, Gate(nn.Linear(D, 1), StraightThrough()))


def test_the_children_a_pattern_names_are_wrapped_and_no_others():
    model = dynanet.convert(Net(), {r"layer1\.[12]": skip, "layer2.0": skip})
    assert list(layers(model)) == ["layer1.1", "layer1.2", "layer2.0"]
    gates = {layer.gate for layer in layers(model).values()}
    assert len(gates) == 3, "each has a gate of its own"


def test_with_everything_kept_the_new_model_answers_as_the_old_one():
    net, x = Net(), torch.randn(6, D)
    model = dynanet.convert(net, {r"layer.\.\d": skip}).eval()
    for sparse in (False, True):
        with forced(execute(model, sparse=sparse), everything):
            assert torch.allclose(model(x), net(x))
    assert CostModel(model, x).full == CostModel(net, x).full + 5 * D, "and the gates"


def test_the_given_model_stays_as_it_was_and_shares_no_weights():
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = dynanet.convert(net, {"layer1.0": skip})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert not layers(net)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_converted_model_keeps_the_laws():
    check_dynamic(dynanet.convert(Net(), {"layer1": skip, r"layer2\.\d": skip}), torch.randn(5, D), portable=False)


def test_what_lies_inside_a_new_layer_is_converted_in_a_second_call():
    changes = {"layer1": skip, r"layer1\.2": skip}
    with pytest.raises(StructureError, match="'layer1.2' lies inside 'layer1'"):
        dynanet.convert(Net(), changes)
    inner = dynanet.convert(Net(), {r"layer1\.2": skip})
    assert list(layers(dynanet.convert(inner, {"layer1": skip}))) == ["layer1", "layer1.block.2"]


def test_a_pattern_must_match_whole_names_and_something():
    for pattern in ("layer", r"1\.0", "layer3"):
        with pytest.raises(StructureError, match="no child is named.*'stem', 'layer1'"):
            dynanet.convert(Net(), {pattern: skip})


def test_a_child_that_two_patterns_match_is_refused():
    with pytest.raises(StructureError, match=r"'layer1.0' is matched by .*; let one match it"):
        dynanet.convert(Net(), {r"layer1\.0": skip, r"layer\d\.0": skip})


def test_a_shared_child_stays_shared():
    cell = Residual()
    model = dynanet.convert(nn.Sequential(cell, nn.Tanh(), cell), {"[02]": skip}).eval()
    assert model[0] is model[2] and list(layers(model)) == ["0"]
    with record(model) as trace:
        model(torch.randn(3, D))
    assert len(trace["0"]) == 2
    again = dynanet.convert(nn.Sequential(cell, nn.Tanh(), cell), {"2": skip})
    assert again[0] is again[2] and isinstance(again[0], LayerSkip), "named in one place, changed in both"
    with pytest.raises(StructureError, match="'2' is matched by '0' and '2'"):
        dynanet.convert(nn.Sequential(cell, nn.Tanh(), cell), {"0": skip, "2": skip})
