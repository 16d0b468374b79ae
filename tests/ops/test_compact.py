"""A compact chain answers at kept positions as over the whole image, on torch and natively, and nothing elsewhere."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from dynanet.core.dynamic import Dynamic, execute
from dynanet.core.errors import StructureError
from dynanet.core.macs import CountMacs
from dynanet.ops.compact import Compact

C = 3


def conv(inside, outside, kernel=3, **how):
    return nn.Conv2d(inside, outside, kernel, padding="same", **how)


UNITS = {
    "1x1": (lambda: conv(C, C, 1), [0]),
    "3x3": (lambda: conv(C, C), [1, 0]),
    "bottleneck": (lambda: nn.Sequential(conv(C, 2, 1), nn.ReLU(), conv(2, 2), nn.SiLU(), conv(2, C, 1)), [1, 0]),
    "dilated": (lambda: nn.Sequential(conv(C, 4, dilation=2), nn.BatchNorm2d(4), conv(4, C, 5), nn.ReLU()), [4, 2, 0]),
    "groups": (lambda: nn.Sequential(nn.ReLU(), conv(C, C, groups=C), conv(C, C)), [2, 1, 0]),
}


class Host(Dynamic):
    """A layer that runs a chain where it is told to."""

    def __init__(self, unit):
        super().__init__()
        self.unit, self.compact = unit, Compact(unit)
        self.units = range(len(self.compact.parts))

    def forward(self, x, keep, otherwise=None, **how):
        if otherwise is None:
            return self.compact.add(self, self.units, keep, x, **how)
        return self.compact.run(self, self.units, keep, x, otherwise)


def host(name, *, sparse):
    torch.manual_seed(0)
    made = Host(UNITS[name][0]()).eval().requires_grad_(False)
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
    return execute(made, sparse=sparse)


def images(height, width, share, seed=0):
    torch.manual_seed(seed)
    x, otherwise = torch.randn(2, 2, C, height, width).unbind()
    return x, otherwise, (torch.rand(2, 1, height, width) < share).float()


@pytest.mark.parametrize("name", UNITS)
@hypothesis.settings(deadline=None, max_examples=10)
@hypothesis.given(
    st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    st.sampled_from([torch.float32, torch.float64]), st.booleans(),
)  # fmt: skip
def test_a_kept_position_answers_what_the_image_would(name, height, width, share, dtype, sparse):
    """float32 runs natively where there are kernels, float64 on torch."""
    x, otherwise, keep = (t.to(dtype) for t in images(height, width, share))
    layer = host(name, sparse=sparse).to(dtype)
    whole, before = layer.unit(x), x.clone()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(layer(x, keep, otherwise), torch.where(keep > 0, whole, otherwise), **close)
    torch.testing.assert_close(layer(x, keep), x + keep * whole, **close)
    assert torch.equal(x, before), "images are not overwritten"
    torch.testing.assert_close(layer(x.clone(), keep, owned=True), before + keep * whole, **close)


@pytest.mark.parametrize("name", UNITS)
def test_each_part_runs_as_far_as_the_later_ones_read(name):
    compact = Compact(UNITS[name][0]())
    assert compact.reach == UNITS[name][1]
    keep = torch.zeros(1, 1, 11, 11)
    keep[0, 0, 5, 5] = 1
    assert [int(where.sum()) for where in compact.sets(keep)] == [(2 * reach + 1) ** 2 for reach in compact.reach]


def test_what_no_position_keeps_costs_nothing():
    x, otherwise, keep = images(6, 6, 0.0)
    layer = host("bottleneck", sparse=True)
    with CountMacs() as count:
        assert torch.equal(layer(x, keep, otherwise), otherwise) and torch.equal(layer(x, keep), x)
    assert count.total == 0


def test_one_kept_position_costs_its_neighbourhood():
    keep = torch.zeros(2, 1, 6, 6)
    keep[0, 0, 3, 3] = 1
    with CountMacs() as count:
        host("bottleneck", sparse=True)(torch.randn(2, C, 6, 6), keep)
    assert count.total == 9 * C * 2 + 9 * 2 * 2 + 2 * C


@pytest.mark.parametrize("sparse", [False, True])
def test_layers_that_are_exchanged_are_noticed(sparse):
    x, _, keep = images(5, 5, 0.5)
    layer = host("bottleneck", sparse=sparse)
    layer(x, keep)
    layer.unit[2] = conv(2, 2, 5).requires_grad_(False)
    torch.testing.assert_close(layer(x, keep), x + keep * layer.unit(x), rtol=1e-4, atol=1e-5)
    assert layer.compact.reach == [2, 0]


def test_gradients_are_those_of_the_image():
    x, otherwise, keep = images(5, 6, 0.4)
    found = []
    for sparse in (False, True):
        layer = host("bottleneck", sparse=sparse).requires_grad_(True)
        layer(x, keep, otherwise).square().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unit", [nn.MaxPool2d(3, 1, 1), nn.Sequential(conv(C, C), nn.Conv2d(C, C, 3, 2, 1))])
def test_what_positions_cannot_run_is_refused(unit):
    with pytest.raises(StructureError, match="on tiles"):
        Compact(unit)
