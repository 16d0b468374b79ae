import pytest
import torch

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, record
from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.nets.resnet import cifar_resnet
from dynanet.testing import check_equal
from dynanet.zoo.fbs_nets import fbs, fbs_resnet, static_vgg


def test_m_cifarnet_has_the_papers_size():
    """174 million MACs."""
    with torch.device("meta"):
        model, x = static_vgg(num_classes=10).eval(), torch.empty(1, 3, 32, 32)
    with CountMacs() as count:
        model(x)
    assert count.total == pytest.approx(174e6, rel=5e-3)


def test_density_saves_as_the_paper_says():
    """Half of the channels in and out: a quarter of the MACs, but for the first convolution and the gates."""
    torch.manual_seed(0)
    model = execute(fbs(num_classes=10, density=0.5).eval(), sparse=True)
    x = torch.randn(1, 3, 32, 32)
    cost = CostModel(model, x)
    with torch.no_grad(), CountMacs() as count:
        model(x)
    gated = cost.full - cost.always
    assert count.total - cost.always == pytest.approx(0.25 * gated, rel=0.01)
    assert cost.always < 0.001 * cost.full


def test_at_full_density_with_saliencies_of_one_it_is_the_static_network():
    torch.manual_seed(0)
    arguments = {"num_classes": 4, "widths": (8, 16), "strides": (1, 2)}
    model, static = fbs(density=1.0, **arguments).eval(), static_vgg(**arguments).eval()
    for i, place in enumerate((0, 3)):
        static[place].load_state_dict(model[0].convs[i].state_dict())
        model[0].norms[i].running_mean.normal_()
        static[place + 1].load_state_dict(model[0].norms[i].state_dict())
        torch.nn.init.zeros_(model[0].gates[i].scorer.map.weight)
    static[-1].load_state_dict(model[-1].state_dict())
    x = torch.randn(3, 3, 10, 10)
    with torch.no_grad():
        for sparse in (False, True):
            torch.testing.assert_close(execute(model, sparse=sparse)(x), static(x))


def test_a_boosted_resnet_is_the_static_one_at_full_density_and_saves_at_half():
    torch.manual_seed(0)
    arguments = {"num_classes": 4, "depth": 8, "widths": (4, 8, 8)}
    model, static = fbs_resnet(density=1.0, **arguments).eval(), cifar_resnet(**arguments).eval()
    for i in (0, 4):
        static[i].load_state_dict(model[i].state_dict())
    for mine, theirs in zip(model[1:4], static[1:4], strict=True):
        for k, place in enumerate((0, 3)):
            theirs.branch[place].load_state_dict(mine.branch.convs[k].state_dict())
            theirs.branch[place + 1].load_state_dict(mine.branch.norms[k].state_dict())
            torch.nn.init.zeros_(mine.branch.gates[k].scorer.map.weight)
    x = torch.randn(3, 3, 10, 10)
    with torch.no_grad():
        for sparse in (False, True):
            torch.testing.assert_close(execute(model, sparse=sparse)(x), static(x))
    half = fbs_resnet(density=0.5, **arguments)
    check_equal(half, x, draws=2)
    cost = CostModel(half, x)
    with torch.no_grad(), CountMacs() as count:
        execute(half.eval(), sparse=True)(x[:1])
    prices = [cost.unit[f"{block}.branch"] for block in (1, 2, 3)]
    halves, quarters = sum(p[:4].sum() for p in prices), sum(p[4:].sum() for p in prices)
    assert count.total == cost.always + halves / 2 + quarters / 4, "half of the outputs, of all and of half the inputs"
    assert cost.full == cost.always + halves + quarters


@pytest.mark.parametrize("groups, units", [(4, 4), (None, 16)])
def test_groups_are_as_asked_or_single_channels(groups, units):
    model = fbs(num_classes=4, widths=(16, 16), strides=(1, 1), groups=groups)
    assert model[0].groups == (units, units)


@pytest.mark.parametrize("arguments, says", [
    ({"density": 0.0}, "density must be.*got 0.0"),
    ({"density": 1.2}, "density must be.*got 1.2"),
    ({"groups": 5}, "groups must divide every width"),
    ({"strides": (1,)}, "one stride per width"),
])  # fmt: skip
def test_what_means_no_network_is_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        fbs(num_classes=4, **arguments)


def test_saliencies_do_not_grow_from_block_to_block():
    torch.manual_seed(0)
    model = fbs_resnet(num_classes=10, depth=14).train()
    images = torch.randn(32, 3, 1, 1) + 0.2 * torch.randn(32, 3, 32, 32)  # like photographs, light or dark all over
    with record(model) as trace:
        model(images)
    assert max(float(call.decision.score.detach().max()) for call in trace.calls) < 30
