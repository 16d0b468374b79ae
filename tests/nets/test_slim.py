import pytest
import torch
from torch import nn

from dynanet.core.errors import ConfigError, StructureError
from dynanet.nets.slim import SlimBatchNorm2d, SlimConv2d, SlimLinear, SlimResidual, SlimSequential, scaled


def test_a_residual_block_is_at_every_width_what_its_plain_form_is():
    torch.manual_seed(0)
    wide = (4, 6)

    def normed(*arguments):
        return SlimSequential(SlimConv2d(*arguments), SlimBatchNorm2d(wide))

    block = SlimResidual(SlimSequential(normed(wide, wide, 3, 2), nn.ReLU(), normed(wide, wide, 3)),
                         normed(wide, wide, 1, 2))  # fmt: skip
    same = SlimResidual(normed(wide, wide, 3))
    for u in (0, 1):
        x = torch.randn(5, wide[u], 6, 7)
        for each in (block, same):
            each.train()(x, u)
            plain = each.eval().at(u)
            torch.testing.assert_close(plain(x), each(x, u))
            kinds = {type(module) for module in plain.modules()}
            assert nn.Conv2d in kinds and SlimConv2d not in kinds
        torch.testing.assert_close(same(x, u), (same.branch(x, u) + x).relu())


@pytest.mark.parametrize("widths", [(8, 4), (0, 4), (), (4.0, 8), (True, 2)])
def test_widths_that_fall_or_mean_nothing_are_refused(widths):
    with pytest.raises(ConfigError, match="inputs must be|outputs must be|channels must be"):
        SlimConv2d((3,) * len(widths), widths, 3)


@pytest.mark.parametrize("ratios", [(0.5, 0.25), (0.5, 0.5), (0.0, 1.0), (0.5, 1.5), ()])
def test_ratios_that_do_not_ascend_are_refused(ratios):
    with pytest.raises(ConfigError, match="ratios must be ascending"):
        scaled(32, ratios)


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ConfigError, match="one number in and one out"):
        SlimConv2d((3,), (4, 8), 3)
    with pytest.raises(ConfigError, match="depthwise"):
        SlimConv2d((4, 8), (4, 9), 3, depthwise=True)
    with pytest.raises(StructureError, match="one number of widths"):
        SlimSequential(SlimConv2d((3, 3), (4, 8), 3), SlimLinear((4,), 2))
    with pytest.raises(StructureError, match="one number of widths"):
        SlimSequential(nn.ReLU())
    with pytest.raises(StructureError, match="with a shortcut of 1"):
        SlimResidual(SlimSequential(SlimConv2d((3, 3), (4, 8), 3)), SlimSequential(SlimConv2d((3,), (8,), 1)))
