import pytest
import torch
from torch.nn import functional as F

from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.nets.dynamic_conv import DynamicConv2d
from dynanet.train.schedules import anneal_temperature, linear
from tests.nets.portable import check_alone, check_portable


def test_a_batch_is_the_loop():
    torch.manual_seed(0)
    layer, x = DynamicConv2d(8, 6, 3, stride=2, padding=1, groups=2).double(), torch.randn(5, 8, 9, 8).double()
    pi = layer.attention(x)
    rows = [
        F.conv2d(
            row[None], sum(p * w for p, w in zip(share, layer.weight, strict=True)), share @ layer.bias, 2, 1, 1, 2
        )
        for row, share in zip(x, pi, strict=True)
    ]
    torch.testing.assert_close(layer(x), torch.cat(rows), rtol=1e-12, atol=1e-12)
    check_alone(layer, x)


def test_portable():
    torch.manual_seed(0)
    check_portable(DynamicConv2d(8, 6, 3, padding=1, temperature=2.0), torch.randn(3, 8, 7, 6))


def test_what_it_costs():
    layer, x = DynamicConv2d(8, 6, 3, padding=1, kernels=4, reduction=4), torch.randn(5, 8, 9, 7)
    with CountMacs() as count:
        layer(x)
    assert count.total == 5 * (8 * 2 + 2 * 4 + 4 * (6 * 8 * 9 + 6) + 9 * 7 * 6 * 8 * 9)


def test_the_temperature_is_annealed_from_even_shares():
    torch.manual_seed(0)
    layer, x = DynamicConv2d(8, 6, 3), 30 * torch.randn(20, 8, 7, 7)
    anneal = anneal_temperature(layer, linear(30.0, 1.0, share=0.1))
    spread = []
    for progress in (0.0, 0.05, 0.1, 1.0):
        anneal(progress)
        shares = layer.attention(x)
        torch.testing.assert_close(shares.sum(1), torch.ones(20))
        spread.append(shares.std(1).mean().item())
    assert layer.temperature == 1.0
    assert spread[0] < spread[1] < spread[2] == spread[3]


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": float("nan")}, {"kernels": 0}, {"reduction": 0}], ids=str
)
def test_bad_settings(settings):
    with pytest.raises(ConfigError, match="(temperature must be above 0|(kernels|reduction) must be at least 1), got"):
        DynamicConv2d(4, 6, 3, **settings)
