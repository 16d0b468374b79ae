import pytest
import torch

from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.nets.resnet import PadShortcut, bottleneck, cifar_blocks, cifar_resnet, head, imagenet_resnet


def macs(model, size):
    with CountMacs() as count, torch.no_grad():
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return count.total


def built(build, **arguments):
    with torch.device("meta"):
        return build(**arguments)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_macs_of_resnet_32():
    """137.73 million floating point operations, two per multiply-accumulate, without the linear layer: by Figurnov et
    al.'s counter (arXiv:1612.02297) for the network of the same convolutions.
    """
    assert 2 * (macs(built(cifar_resnet, num_classes=10, depth=32), 32) - 640) == pytest.approx(137.73e6, rel=1e-4)


@pytest.mark.parametrize("depth, millions", [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_parameters_as_in_the_paper(depth, millions):
    """He et al. 2016, table 6."""
    found = parameters(built(cifar_resnet, num_classes=10, depth=depth)) / 1e6
    assert found == pytest.approx(millions, abs=0.005)


def test_the_shortcut_without_parameters():
    x = torch.randn(2, 3, 5, 4)
    y = PadShortcut(2, 2)(x)
    assert y.shape == (2, 5, 3, 2) and not y[:, 3:].any()
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])


@pytest.mark.parametrize("size", [(32, 32), (9, 6), (1, 1)])
def test_branch_and_shortcut_agree_on_any_size(size):
    for block in (*cifar_blocks(14, (4, 8, 8)), bottleneck(8, 4, 2), bottleneck(16, 4)):
        x = torch.randn(2, block.inputs, *size)
        assert block.branch(x).shape == block.shortcut(x).shape == block(x).shape
    net = cifar_resnet(num_classes=3, depth=8, in_channels=2, widths=(4, 8, 8)).eval()
    assert net(torch.zeros(0, 2, *size)).shape == (0, 3)


@pytest.mark.parametrize("depth", [2, 9, 100, 20.0])
def test_depths_that_are_none(depth):
    with pytest.raises(ConfigError, match=r"depth must be 6n \+ 2"):
        cifar_blocks(depth)


def test_other_figures_that_are_none():
    with pytest.raises(ConfigError, match="50, 101, 152"):
        imagenet_resnet(depth=18)
    with pytest.raises(ConfigError, match="widths"):
        cifar_blocks(8, (8, 4, 16))
    with pytest.raises(ConfigError, match="num_classes must be at least 1, got 0"):
        head(4, 0)
