"""Region convolutions on rows, against masks on images in plain torch."""

import pytest
import torch
from torch import nn

from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import StructureError
from dynanet.ops.positions import PositionChain
from dynanet.ops.region import Region, flat_image

C = 4


class Layer(Dynamic):
    sparse = True

    def forward(self, x):
        return x


def norm():
    made = nn.BatchNorm2d(C)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    made.running_mean.normal_()
    return made


def conv(k=3, d=1, groups=1, bias=True):
    return nn.Conv2d(C, C, k, padding=d * (k - 1) // 2, dilation=d, groups=groups, bias=bias)


CHAINS = {
    "two": (lambda: [conv(), nn.ReLU(), conv(d=2)], lambda m, x, at: m[2](at * m[1](m[0](x)))),
    "norm first": (lambda: [norm(), nn.ReLU(), conv(bias=False)], lambda m, x, at: m[2](m[1](m[0](x)))),
    "1x1 first": (
        lambda: [norm(), conv(1), nn.Tanh(), conv(5)],
        lambda m, x, at: m[3](at * m[2](m[1](m[0](x)))),
    ),
    "groups": (lambda: [conv(groups=2), conv(groups=4)], lambda m, x, at: m[1](at * m[0](x))),
    "even": (
        lambda: [nn.Conv2d(C, C, 2, padding="same", dilation=2), nn.ReLU(), conv(4, 2)],
        lambda m, x, at: m[2](at * m[1](m[0](x))),
    ),
    "no convolution": (lambda: [norm(), nn.Sigmoid()], lambda m, x, at: m[1](m[0](x))),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("size", [(2, 7, 5), (1, 1, 1), (3, 2, 9)])
def test_rows_are_what_masks_give(name, size):
    torch.manual_seed(0)
    layers, by_hand = CHAINS[name]
    unit = nn.Sequential(*layers()).double().eval()
    batch, height, width = size
    x = torch.randn(batch, C, height, width, dtype=torch.float64)
    at = (torch.rand(batch, 1, height, width) < 0.5).double()
    at[0, 0, 0, 0] = 1
    before, chain, region = x.clone(), PositionChain(unit), Region(Layer().eval(), 0, at)
    with torch.no_grad():
        rows = chain.rows(region, flat_image(x))
        expected = by_hand(unit, x, at)
        torch.testing.assert_close(rows, expected.permute(0, 2, 3, 1).flatten(0, 2)[region.index])
        torch.testing.assert_close(chain.dense(x, at), expected)
    assert torch.equal(x, before)


def test_a_weight_that_changes_is_seen():
    unit = conv().eval()
    x, at = torch.randn(1, C, 3, 3), torch.ones(1, 1, 3, 3)
    chain = PositionChain(unit)
    with torch.no_grad():
        chain.rows(Region(Layer().eval(), 0, at), flat_image(x))
        unit.weight.mul_(2)
        again = chain.rows(Region(Layer().eval(), 0, at), flat_image(x))
        torch.testing.assert_close(again, unit(x).permute(0, 2, 3, 1).flatten(0, 2))


def test_gradients_reach_the_weights():
    torch.manual_seed(0)
    unit = nn.Sequential(conv(), nn.ReLU(), conv()).eval()
    x, at = torch.randn(1, C, 4, 3, requires_grad=True), torch.ones(1, 1, 4, 3)
    PositionChain(unit).rows(Region(Layer().eval(), 0, at), flat_image(x)).square().sum().backward()
    found = [p.grad.clone() for p in (*unit.parameters(), x)]
    for p in (*unit.parameters(), x):
        p.grad = None
    unit(x).square().sum().backward()
    for ours, theirs in zip(found, [p.grad for p in (*unit.parameters(), x)], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_cannot_run_on_positions():
    with pytest.raises(StructureError, match="stride-1"):
        PositionChain(nn.Conv2d(C, C, 3, stride=2, padding=1))
    with pytest.raises(StructureError, match="cannot run on tiles"):
        PositionChain(nn.Sequential(nn.AvgPool2d(3)))
