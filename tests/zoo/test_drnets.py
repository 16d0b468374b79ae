import pytest
import torch

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, record
from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.export import bundle
from dynanet.nets.resnet import cifar_resnet, imagenet_resnet
from dynanet.testing import check_equal
from dynanet.zoo import drnet, drnet_imagenet
from dynanet.zoo.saved import load

SMALL = {"num_classes": 5, "sizes": (7, 10, 13), "depth": 8, "widths": (4, 6, 8), "predictor_widths": (4, 4)}


def macs(net, side, channels=3):
    with torch.no_grad(), CountMacs() as count:
        net(torch.empty(1, channels, side, side, device="meta"))
    return count.total


def test_the_laws_of_the_whole_net(seeded, seeded_input):
    """Sides that no stride divides."""
    check_equal(seeded(drnet(**SMALL)), seeded_input((3, 3, 11, 17)), draws=1)


@pytest.mark.parametrize("channels", [1, 200])
def test_digits_and_spectra(channels):
    """8 x 8 pixels: every candidate enlarges."""
    model = drnet(num_classes=5, in_channels=channels).eval()
    assert model(torch.randn(2, channels, 8, 8)).shape == (2, 5)


def test_a_size_costs_what_the_network_costs_there():
    cost = CostModel(drnet(num_classes=10), torch.zeros(1, 3, 32, 32))
    with torch.device("meta"):
        net = cifar_resnet(num_classes=10, depth=14).eval()
    assert cost.unit[""].tolist() == [macs(net, side) for side in (16, 24, 32)]
    assert cost.always < 0.02 * cost.full and cost.full == cost.always + macs(net, 32)


def test_imagenet_sizes():
    """A ResNet-50 at three sizes, and the predictor for less than a tenth of it."""
    with torch.device("meta"):
        model, net = drnet_imagenet().eval(), imagenet_resnet().eval()
        found = [macs(view, 224) for view in model.nets]
        assert found == [macs(net, side) for side in (112, 168, 224)]
        assert macs(model.gate.scorer, 224) < 0.1 * found[-1]


def test_weights_are_there_once_and_norms_per_size():
    model, net = drnet(num_classes=10), cifar_resnet(num_classes=10, depth=14)
    norms = sum(p.numel() for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters())
    whole = sum(p.numel() for p in net.parameters())
    assert sum(p.numel() for p in model.nets.parameters()) == whole + 2 * norms


def test_it_comes_back_from_its_folder(tmp_path, seeded, seeded_input):
    """Weights that are shared are saved once per size, and shared again when loaded."""
    model, x = seeded(drnet(**SMALL)), seeded_input((4, 3, 12, 12))
    bundle(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    with torch.no_grad(), record(execute(loaded, sparse=True)):
        torch.testing.assert_close(loaded(x), model(x))
    first, last = loaded.nets[0][1], loaded.nets[2][1]
    assert first[0][0].weight is last[0][0].weight and first[0][1].weight is not last[0][1].weight


@pytest.mark.parametrize("sizes", [(13, 10), (7, 7), (7,), (0, 7)])
def test_sizes_that_do_not_grow_are_refused(sizes):
    with pytest.raises(ConfigError, match="must be ascending|two or more|size must be at least 1"):
        drnet(**{**SMALL, "sizes": sizes})
