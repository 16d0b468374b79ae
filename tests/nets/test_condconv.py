import pytest
import torch
from torch.nn import functional as F

from dynanet.core.cost import CostModel
from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.nets.condconv import CondConv2d, conv2d_per_sample
from tests.nets.portable import check_alone, check_portable

SHAPES = [{}, {"stride": 2, "padding": 1}, {"groups": 2, "padding": 2, "dilation": 2}, {"bias": False}]


def a_loop(layer, x):
    """By the definition: expert outputs (not kernels) mixed, sample by sample."""
    shares = layer.routing(x)
    rows = []
    for row, r in zip(x, shares, strict=True):
        outputs = [
            F.conv2d(row[None], w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
            + (0 if layer.bias is None else layer.bias[e][:, None, None])
            for e, w in enumerate(layer.weight)
        ]
        rows.append(sum(r[e] * y for e, y in enumerate(outputs)))
    return torch.cat(rows)


@pytest.mark.parametrize("settings", SHAPES)
def test_a_batch_is_the_loop(settings):
    torch.manual_seed(0)
    layer, x = CondConv2d(4, 6, 3, experts=3, **settings).double(), torch.randn(5, 4, 9, 8).double()
    torch.testing.assert_close(layer(x), a_loop(layer, x), rtol=1e-12, atol=1e-12)
    assert layer.routing(x).std(0).min() > 0  # or samples would share a kernel, and nothing were tested
    check_alone(layer, x)


def test_portable():
    torch.manual_seed(0)
    check_portable(CondConv2d(4, 6, 3, experts=3, stride=2, **SHAPES[2]), torch.randn(3, 4, 9, 8))


@pytest.mark.parametrize("groups", [1, 2])
def test_what_it_costs(groups):
    layer, x = CondConv2d(4, 6, 3, experts=3, padding=1, groups=groups), torch.randn(5, 4, 9, 8)
    weights = 6 * 4 // groups * 9
    per_sample = 4 * 3 + 3 * weights + 3 * 6 + 9 * 8 * weights
    with CountMacs() as count:
        layer(x)
    assert count.total == 5 * per_sample
    assert CostModel(layer, x).full == per_sample
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    with CountMacs() as count:
        exported(x)
    assert count.total == 5 * per_sample


def test_one_kernel_for_all_samples():
    x, weight = torch.randn(3, 4, 5, 5), torch.randn(1, 6, 4, 3, 3)
    same = conv2d_per_sample(x, weight.expand(3, -1, -1, -1, -1), torch.ones(1, 6))
    torch.testing.assert_close(conv2d_per_sample(x, weight, torch.ones(1, 6)), same)


@pytest.mark.parametrize(
    "settings",
    [{"experts": 0}, {"kernel_size": 0}, {"stride": 0}, {"padding": -1}, {"groups": 3}, {"in_channels": 0}],
    ids=str,
)
def test_bad_sizes(settings):
    with pytest.raises(ConfigError):
        CondConv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **settings})
