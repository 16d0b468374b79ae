"""Shared layers have the sizes and the first weights that their papers say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynanet.nets import blocks


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 3, 5, 7]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 20))
def test_an_odd_kernel_keeps_the_size_but_for_its_stride(kernel, stride, dilation, side):
    x = torch.zeros(1, 2, side, side)
    for layer in (blocks.conv, blocks.conv_bn):
        made = layer(2, 3, kernel, stride, dilation=dilation).eval()
        assert made(x).shape == (1, 3, math.ceil(side / stride), math.ceil(side / stride))


@pytest.mark.parametrize(("kernel", "outputs"), [(1, 256), (3, 64), (7, 32)])
def test_convolutions_start_by_fan_out(kernel, outputs):
    layer = blocks.conv(64, outputs, kernel, bias=True)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (outputs * kernel**2)), rel=0.05)
    assert not layer.bias.any() and blocks.conv(1, 1, 1).bias is None


def test_a_norm_and_a_relu_follow_the_convolution():
    x = torch.randn(8, 2, 6, 6)
    block = blocks.conv_bn_relu(2, 4, 3)
    normed = nn.functional.batch_norm(block[0](x), None, None, training=True)
    torch.testing.assert_close(block(x), normed.relu())


@pytest.mark.parametrize("init", [blocks.init_truncated, blocks.init_normal])
def test_weights_of_transformers_have_a_deviation_of_a_fiftieth(init):
    layers = [nn.Linear(200, 100), nn.Linear(100, 50)]
    init(*layers)
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and not layer.bias.any()


def test_only_what_has_such_weights_is_drawn():
    table = nn.Embedding(300, 50)
    blocks.init_normal(table)
    assert table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    with pytest.raises(AssertionError):
        blocks.init_truncated(table)
    with pytest.raises(AssertionError):
        blocks.init_normal(nn.LayerNorm(3))


def test_classifiers_start_without_a_preference_and_see_the_mean():
    head = blocks.pooled_classifier(4, 3)
    x = torch.randn(2, 4, 5, 7)
    assert torch.equal(head(torch.zeros(1, 4, 2, 2)), torch.zeros(1, 3))
    torch.testing.assert_close(head(x), head[-1](x.mean((2, 3))))
    assert not blocks.linear(4, 3).bias.any() and not blocks.classifier(4, 3).bias.any()


def test_resizing_takes_the_others_size_and_keeps_what_is_constant():
    x, like = torch.full((2, 3, 4, 5), 1.5), torch.zeros(1, 1, 9, 2)
    for align in (False, True):
        assert torch.allclose(blocks.resized(x, like, align_corners=align), torch.full((2, 3, 9, 2), 1.5))
    ramp = torch.arange(3.0).view(1, 1, 1, 3)
    assert blocks.resized(ramp, torch.zeros(1, 1, 1, 5), align_corners=True).flatten().tolist() == [0, 0.5, 1, 1.5, 2]
    assert torch.equal(blocks.resized(ramp, ramp), ramp)
