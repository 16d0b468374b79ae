"""Which layers of a chain run in one native call, and which chains stay with torch."""

import pytest
import torch
from torch import nn

from dynanet.ops.native import library
from dynanet.ops.native.chains import Chain, fused, runs


def test_a_relu_joins_the_convolution_before_it():
    conv, relu, gelu = nn.Conv2d(1, 1, 1), nn.ReLU(), nn.GELU()
    assert fused([relu, conv, relu, gelu, conv]) == [(relu, False), (conv, True), (gelu, False), (conv, False)]


def test_a_chain_runs_in_as_few_calls_as_can_be():
    first, second, third = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
    relu, gelu = nn.ReLU(), nn.GELU()
    parts, reach = [[first, relu], [second, relu, third]], [1, 0]
    (whole,) = runs(parts, reach, apart=False)
    assert whole.convolutions == [(first, True, 1), (second, True, 0), (third, False, 0)] and whole.reach == 0
    assert [len(run.convolutions) for run in runs(parts, reach, apart=True)] == [1, 2]
    with_gelu = runs([[first, gelu], [second, third]], reach, apart=False)
    assert [(run.part, run.other, len(run.convolutions)) for run in with_gelu] == [
        (0, None, 1),
        (0, gelu, 0),
        (1, None, 2),
    ]


def frozen(*sizes, **how):
    return nn.Conv2d(*sizes, **how).requires_grad_(False)


def test_a_chain_is_ready_with_every_convolution_packed_once(kernels):
    chain, layers = Chain(), [frozen(3, 4, 1), nn.ReLU(), frozen(4, 5, 3, bias=False)]
    ready = chain.ready(layers, torch.ones(2, 3))
    assert list(ready) == [layers[0], layers[2]]
    assert ready[layers[0]][1].numel() >= 4 and ready[layers[2]][1] is None
    again = chain.ready(layers)
    assert all(again[layer][0] is ready[layer][0] for layer in ready)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.ReLU()],
        [frozen(4, 4, 1), frozen(4, 4, 3, groups=2)],
        [frozen(4, 4, 1), frozen(4, 4, 99)],
        [frozen(4, 4, 1), nn.Conv2d(4, 4, 1)],
    ],
    ids=["no convolution", "groups", "a very large kernel", "a weight that trains"],
)
def test_what_stays_with_torch(kernels, layers):
    assert Chain().ready(layers, torch.ones(2, 4)) is None


def test_without_kernels_and_with_other_rows_nothing_is_ready(kernels):
    layers = [frozen(4, 4, 1)]
    assert Chain().ready(layers, torch.ones(2, 4).double()) is None
    with library.using(""):
        assert Chain().ready(layers) is None
