import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.testing import check_equal
from dynanet.zoo.ds_nets import ds_net, slimmable_mobilenet

SMALL = {
    "early": (4, 4, 6, 6), "middle": (4, 8, 12), "late": (8, 12, 16), "depths": (1, 1, 1, 2, 1),
    "strides": (1, 1, 2, 2, 1, 1),
}  # fmt: skip


def macs_and_outputs(model, size=224):
    """MACs, and what the convolutions answer, for one image."""
    outputs = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, args, y: outputs.append(y.numel()))
    with torch.no_grad(), CountMacs() as count:
        model(torch.empty(1, 3, size, size, device="meta"))
    return count.total, sum(outputs)


@pytest.mark.parametrize("u, macs, parameters", [
    (0, 41.03e6, 0.470e6), (1, 149.50e6, 1.332e6), (2, 325.40e6, 2.586e6), (3, 568.74e6, 4.232e6),
])  # fmt: skip
def test_mobilenet_at_its_four_widths(u, macs, parameters):
    """Yu et al.: 41, 150, 325 and 569 million; Howard et al.: also 0.5, 1.3, 2.6 and 4.2 million parameters."""
    with torch.device("meta"):
        model = slimmable_mobilenet(num_classes=1000).at(u).eval()
        assert macs_and_outputs(model)[0] == pytest.approx(macs, rel=1e-4)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize("u, flops", [(0, 133e6), (3, 565e6)])
def test_the_published_range_of_ds_net(u, flops):
    """133 and 565 million: MACs, and one for every number that a convolution answers."""
    with torch.device("meta"):
        model = ds_net(num_classes=1000).eval()
        plain = nn.Sequential(model[0], model[1].net.at(u))
        macs, outputs = macs_and_outputs(plain)
    assert macs + outputs == pytest.approx(flops, abs=0.5e6)


def test_it_keeps_the_laws():
    torch.manual_seed(0)
    check_equal(ds_net(num_classes=4, **SMALL), torch.randn(3, 3, 12, 12), draws=2)


def test_widths_are_priced_in_order_and_the_early_stages_always_run():
    model = ds_net(num_classes=4, **SMALL)
    cost = CostModel(model, torch.randn(1, 3, 12, 12))
    prices = cost.unit["1"]
    assert prices.shape == (3,) and (prices.diff() > 0).all()
    assert cost.always > 0


@pytest.mark.parametrize("arguments", [{"middle": (8, 4, 12)}, {"late": (8, 8, 16)}, {"late": (8, 16)}])
def test_widths_that_are_not_ascending_are_refused(arguments):
    with pytest.raises(ConfigError, match="ascending"):
        ds_net(num_classes=4, **{**SMALL, **arguments})


def test_another_number_of_stages_is_refused():
    with pytest.raises(ConfigError, match="expected 4, 5 and 6"):
        ds_net(num_classes=4, **{**SMALL, "depths": (1, 1)})
