"""What MSDNet and RANet share has the sizes that both count on."""

import pytest
import torch
from torch import nn

from dynanet.nets.multiscale import HEADS, ConvExit, finest_scale, grow_conv


@pytest.mark.parametrize(("head", "side"), [("cifar", 32), ("imagenet", 8)])
def test_the_finest_scale_is_full_or_a_quarter(head, side):
    assert head in HEADS
    stem = finest_scale(3, 6, head).eval()
    assert stem(torch.randn(2, 3, 32, 32)).shape == (2, 6, side, side)
    assert (stem[0].bias is not None) == (head == "imagenet")


@pytest.mark.parametrize(
    ("inputs", "outputs", "factor", "hidden"), [(16, 4, 2, 8), (6, 4, 2, 6), (16, 4, None, None), (8, 4, 1, 4)]
)
def test_a_bottleneck_is_never_wider_than_its_input(inputs, outputs, factor, hidden):
    block = grow_conv(inputs, outputs, factor, 2)
    convs = [layer for layer in block if isinstance(layer, nn.Conv2d)]
    widths = [inputs, outputs] if hidden is None else [inputs, hidden, outputs]
    assert [conv.in_channels for conv in convs] + [convs[-1].out_channels] == widths
    assert [conv.kernel_size[0] for conv in convs] == [1, 3][-len(convs) :]
    assert block.eval()(torch.randn(1, inputs, 7, 7)).shape == (1, outputs, 4, 4)
    assert block(torch.randn(1, inputs, 7, 7)).min() >= 0


@pytest.mark.parametrize("side", [1, 5, 8, 33])
def test_an_exit_reads_what_it_selects_at_any_size(side):
    torch.manual_seed(0)
    head = ConvExit(4, 6, 3, select=lambda state: state[-1]).eval()
    x = torch.randn(2, 4, side, side)
    logits = head([torch.randn(2, 9, 2, 2), x])
    assert logits.shape == (2, 3) and torch.equal(head([x]), logits)


def test_an_exit_pools_as_the_authors_do_at_their_size():
    torch.manual_seed(0)
    head = ConvExit(4, 6, 3, select=lambda x: x).eval()
    x = torch.randn(2, 4, 8, 8)
    pooled = nn.functional.avg_pool2d(head.convs(x), 2).flatten(1)
    torch.testing.assert_close(head(x), head.linear(pooled))
