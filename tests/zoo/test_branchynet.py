import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, forced, record
from dynanet.core.errors import ConfigError
from dynanet.gates.confidence import Entropy
from dynanet.testing import check_equal, check_portable
from dynanet.zoo.branchynet import branchy_alexnet, branchy_lenet, branchy_resnet
from dynanet.zoo.reference import macs_per_exit

BUILDERS = {"lenet": branchy_lenet, "alexnet": branchy_alexnet, "resnet": branchy_resnet}
INPUT = {"lenet": (1, 28, 28), "alexnet": (3, 32, 32), "resnet": (3, 32, 32)}
FEATURES = {  # that enter the linear layers of the authors' networks, github.com/kunglab/branchynet networks/
    "lenet": ([720], [640, 84]),
    "alexnet": ([1024, 256], [512, 128, 128]),
    "resnet": ([], [7200, 3600, 14400, 576]),
}


def linears(modules):
    return [m.in_features for m in modules.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("name", BUILDERS)
def test_the_linear_layers_have_the_widths_of_the_authors(name):
    with torch.device("meta"):
        model = BUILDERS[name]()
    assert (linears(model.stages), linears(model.exits)) == FEATURES[name]
    assert isinstance(model.confidence, Entropy)
    answers = model.to_empty(device="cpu").answers(torch.zeros(2, *INPUT[name])) if name != "resnet" else []
    assert all(a.shape == (2, 10) for a in answers)


def test_lenet_counted_by_hand():
    first = 30**2 * 5 * 25
    branch = 15**2 * 10 * 45 + 640 * 10
    rest = 17**2 * 10 * 125 + 11**2 * 20 * 250 + 720 * 84 + 84 * 10
    assert macs_per_exit(branchy_lenet(), (1, 28, 28)) == [first + branch, first + branch + rest]


def test_the_resnet_has_110_layers_and_more_for_branches():
    with torch.device("meta"):
        model = branchy_resnet()
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.stages.modules())
    assert convolutions == 1 + 2 * (1 + 3 * 18)
    assert model.steps == 3


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("size", [23, 29])
def test_other_sizes_channels_and_classes(name, size):
    small = {"blocks": 1} if name == "resnet" else {}
    model = BUILDERS[name](num_classes=3, in_channels=5, size=size, **small).eval()
    x = torch.randn(2, 5, size, size)
    assert {a.shape for a in model.answers(x)} == {(2, 3)}
    assert model(x[:0]).shape == (0, 3)
    cost = CostModel(model, x[:1])
    with torch.no_grad(), record(model) as trace, forced(model, everything):
        model(x)
    assert cost.steps(trace)[0].tolist() == macs_per_exit(model, (5, size, size))


@pytest.mark.parametrize("name", BUILDERS)
def test_it_keeps_the_laws(name):
    small = {"lenet": {"size": 14}, "alexnet": {"size": 16}, "resnet": {"blocks": 1, "size": 23}}[name]
    model = BUILDERS[name](num_classes=3, **small).eval()
    x = torch.randn(3, INPUT[name][0], small["size"], small["size"])
    check_equal(model, x, draws=1)
    if name == "alexnet":  # the one with norms over channels between stages
        check_portable(model, x)


@pytest.mark.parametrize(
    ("build", "wrong", "says"),
    [
        (branchy_lenet, {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        (branchy_alexnet, {"size": 15}, "size must be at least 16, got 15"),
        (branchy_alexnet, {"in_channels": True}, "in_channels must be .* got True"),
        (branchy_resnet, {"size": 22}, "size must be at least 23, got 22"),
        (branchy_resnet, {"blocks": 0}, "blocks must be at least 1, got 0"),
    ],
)
def test_what_means_no_network_is_refused(build, wrong, says):
    with pytest.raises(ConfigError, match=says):
        build(**wrong)
