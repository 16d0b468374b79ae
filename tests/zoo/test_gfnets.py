import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.nets.resnet import imagenet_resnet
from dynanet.testing import check_equal
from dynanet.zoo import gfnet, gfnet_imagenet

SMALL = {"num_classes": 5, "widths": (4, 6, 8), "glance_size": 8, "crop_size": 7, "hidden": 6, "policy_hidden": 5}


def test_the_laws_of_the_whole_net(seeded, seeded_input):
    """Sides that no stride divides."""
    model = seeded(gfnet(**SMALL))
    model.thresholds.fill_(-1.2)
    check_equal(model, seeded_input((3, 3, 19, 13)), draws=1)


@pytest.mark.parametrize("channels", [1, 200])
def test_digits_and_spectra(channels):
    """8 x 8 pixels: a crop of 16 is larger than the image."""
    model = gfnet(num_classes=5, in_channels=channels).eval()
    assert model(torch.randn(2, channels, 8, 8)).shape == (2, 5)


def test_a_glimpse_costs_the_same_however_large_the_image_is():
    model = gfnet(**SMALL).eval()
    costs = [CostModel(model, torch.zeros(1, 3, side, side)) for side in (12, 40)]
    assert costs[0].worst == costs[1].worst and torch.equal(costs[0].unit[""], costs[1].unit[""])


def test_imagenet_sizes():
    """Every glimpse is a ResNet-50 on 96 x 96 pixels, within the head's and the policy's cost."""
    with torch.device("meta"):
        model, net = gfnet_imagenet().eval(), imagenet_resnet().eval()
        with CountMacs() as alone:
            net[:-1](torch.empty(1, 3, 96, 96))
        state = model.start(torch.empty(1, 3, 224, 224))
        for k in range(5):
            with CountMacs() as count:
                state, logits = model.step(k, state)
            assert alone.total < count.total < 1.02 * alone.total
    assert logits.shape == (1, 1000)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 2 * 53 + 1  # two encoders, and the policy's own


def test_what_means_no_network_is_refused():
    for wrong, says in (
        ({"depth": 10}, "6n"), ({"glimpses": 0}, "glimpses must be at least 1, got 0"),
        ({"crop_size": -1}, "size must be at least 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            gfnet(**{**SMALL, **wrong})
