import pytest
import torch
from torch import nn

from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.nets.squeeze_excite import SqueezeExcite
from tests.nets.portable import check_alone, check_portable


def test_a_batch_is_its_samples():
    torch.manual_seed(0)
    check_alone(SqueezeExcite(32, reduction=4), torch.randn(5, 32, 3, 4))


def test_scaling_channels_is_scaling_kernels():
    """Why it is a dynamic-parameter layer: after a convolution it is that convolution with a kernel of the sample."""
    torch.manual_seed(0)
    conv, layer, x = nn.Conv2d(4, 16, 3, bias=False).double(), SqueezeExcite(16).double(), torch.randn(3, 4, 7, 7)
    y = conv(x.double())
    for i in range(3):
        kernel = conv.weight * layer.scale(y)[i][:, None, None, None]
        torch.testing.assert_close(layer(y)[i], nn.functional.conv2d(x[i].double(), kernel))


def test_portable():
    torch.manual_seed(0)
    check_portable(SqueezeExcite(16, reduction=4), torch.randn(3, 16, 5, 6))


def test_what_it_costs():
    with CountMacs() as count:
        SqueezeExcite(32)(torch.randn(5, 32, 3, 4))
    assert count.total == 5 * 2 * 32 * 2


@pytest.mark.parametrize("settings", [{"channels": 0}, {"reduction": 0}], ids=str)
def test_bad_sizes(settings):
    with pytest.raises(ConfigError, match="(channels|reduction) must be at least 1, got 0"):
        SqueezeExcite(**{"channels": 8, **settings})
