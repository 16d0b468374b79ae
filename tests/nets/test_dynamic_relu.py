import pytest
import torch

from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.nets.dynamic_relu import DynamicReLU
from tests.nets.portable import check_alone, check_portable

FORMS = pytest.mark.parametrize("per_channel", [True, False])


def trained(**settings):
    """With a last layer that is not zero any more."""
    layer = DynamicReLU(16, **settings)
    torch.nn.init.normal_(layer.predict[-1].weight)
    return layer


@FORMS
def test_a_fresh_one_is_a_relu(per_channel):
    x = torch.randn(5, 16, 3, 4)
    torch.testing.assert_close(DynamicReLU(16, per_channel=per_channel)(x), x.relu())


@FORMS
def test_the_largest_of_the_lines_sample_by_sample(per_channel):
    torch.manual_seed(0)
    layer, x = trained(pieces=3, per_channel=per_channel).double(), torch.randn(5, 16, 3, 4).double()
    slopes, intercepts = layer.coefficients(x)
    assert (slopes - torch.tensor([1.0, 0, 0])).abs().max() < 1 and intercepts.abs().max() < 0.5
    for i in range(5):
        for c in range(16):
            s, b = (t[i, c if per_channel else 0] for t in (slopes, intercepts))
            lines = s[:, None, None] * x[i, c] + b[:, None, None]
            torch.testing.assert_close(layer(x)[i, c], lines.amax(0))
    assert slopes.std(0).min() > 0
    check_alone(layer, x)


def test_features_without_positions():
    check_alone(trained(), torch.randn(5, 16))


def test_portable():
    torch.manual_seed(0)
    check_portable(trained(), torch.randn(3, 16, 5, 6))


@FORMS
def test_what_it_costs(per_channel):
    with CountMacs() as count:
        DynamicReLU(32, per_channel=per_channel)(torch.randn(5, 32, 3, 4))
    assert count.total == 5 * (32 * 4 + 4 * 4 * (32 if per_channel else 1))


@pytest.mark.parametrize("settings", [{"channels": 0}, {"reduction": 0}, {"pieces": 1}], ids=str)
def test_bad_sizes(settings):
    with pytest.raises(ConfigError, match="(channels|reduction|pieces) must be at least"):
        DynamicReLU(**{"channels": 8, **settings})
