import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import StructureError
from dynanet.mechanisms.channel_gating import ChannelGating, ThresholdTarget
from dynanet.ops.tiles import Tiles
from dynanet.testing import check_equal, check_gradients
from dynanet.train.objectives import CrossEntropy


def conv(**options):
    torch.manual_seed(0)
    return nn.Conv2d(8, 12, 3, **{"padding": 1, **options})


def on(d):
    return torch.ones_like(d.keep)


def off(d):
    return torch.zeros_like(d.keep)


def read_first(whole, groups):
    """1 where a weight belongs to the base path of two channels: the first ones, or four apart for every group."""
    mask = torch.zeros_like(whole.weight)
    for o in range(12):
        group = o // (12 // groups)
        mask[o, [0, 1] if groups == 1 else [group % 4, group % 4 + 4]] = 1
    return mask


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(6, 8, 9, 7)


@pytest.mark.parametrize("options", [{"groups": 3}, {"tiles": Tiles(4, 1)}, {"groups": 12, "tiles": Tiles(1, 1)}])
def test_open_it_is_the_convolution_and_closed_its_base(x, options):
    whole = conv()
    layer = ChannelGating(whole, 2, **options)
    for sparse in (False, True):
        execute(layer.eval(), sparse=sparse)
        scale = (1 + 1e-5) ** 0.5  # of norms that are new
        with torch.no_grad():
            with forced(layer, on):
                torch.testing.assert_close(layer(x) * scale, whole(x))
            base = nn.functional.conv2d(
                x, whole.weight * read_first(whole, options.get("groups", 1)), whole.bias, padding=1
            )
            with forced(layer, off):
                torch.testing.assert_close(layer(x) * scale, base)


def test_prices_are_the_channels_that_were_left(x):
    layer = ChannelGating(conv(bias=False), 2, groups=3)
    cost = CostModel(layer, x[:1])
    full = 8 * 12 * 9 * 9 * 7
    assert cost.always == full / 4
    assert cost.unit[""].tolist() == [full / 4] * 3
    assert cost.full == full


def test_what_is_far_below_its_threshold_is_left(x):
    layer = ChannelGating(conv(), 4, groups=3).eval()
    with torch.no_grad():
        layer.thresholds.copy_(torch.tensor([-9.0, 9.0, -9.0]))
        with record(layer) as trace:
            layer(x)
    assert trace[""][0].tolist() == [[1.0, 0.0, 1.0]] * 6


@pytest.mark.parametrize("options", [{}, {"groups": 3}, {"tiles": Tiles(4, 1)}, {"groups": 12, "tiles": Tiles(1, 1)}])
def test_thresholds_are_standard_deviations_of_what_they_are_compared_with(options):
    """So whatever the rows, a threshold says what share of them is kept."""
    torch.manual_seed(2)
    x = torch.randn(400, 8, 8, 8) * (1 + torch.rand(400, 8, 1, 1))
    layer = ChannelGating(conv(), 4, **options, threshold=0.0).train()
    with record(layer) as trace:
        layer(x)
    score = trace.calls[0].decision.score.flatten(0, -2)
    torch.testing.assert_close(score.mean(0), torch.zeros(layer.units), atol=1e-3, rtol=0)
    torch.testing.assert_close(score.std(0), torch.ones(layer.units), atol=1e-2, rtol=0)
    with torch.no_grad(), record(layer) as trace:
        layer.thresholds.fill_(0.5)
        layer(x)
    assert 0.2 < trace[""][0].mean() < 0.4


def test_a_gate_learns_which_samples_need_the_other_channels():
    """Samples of two kinds: the second channel says whether the label lies in the first, or among those that are left.
    A gate that exchanges its decisions between samples loses what it learnt.
    """
    torch.manual_seed(0)
    y = torch.randint(2, (256,))
    hidden = torch.rand(256) > 0.5
    x = 0.3 * torch.randn(256, 8, 4, 4)
    sign = (2.0 * y - 1)[:, None, None]
    x[~hidden, 0] += sign[~hidden]
    x[hidden, 5] += sign[hidden]
    x[:, 1] += (2.0 * hidden - 1)[:, None, None]
    layer = ChannelGating(nn.Conv2d(8, 16, 3, padding=1), 2, threshold=0.0)
    model = nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
    objective = CrossEntropy() + 0.5 * ThresholdTarget(0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(60):
        with record(model.train()) as trace:
            loss = objective(model(x), y, trace)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad(), record(model.eval()) as trace:
        right = (model(x).argmax(1) == y).float().mean()
    keep = trace["0"][0]
    assert 0.3 < keep.mean() < 0.7
    with torch.no_grad(), forced(model, lambda d: d.keep[torch.randperm(256)]):
        exchanged = (model(x).argmax(1) == y).float().mean()
    assert right > 0.9 and exchanged < right - 0.1


def test_tiles_that_are_bright_are_finished(x):
    layer = ChannelGating(nn.Conv2d(8, 4, 1), 4, tiles=Tiles(3), threshold=0.0).eval()
    with torch.no_grad():
        layer.base.weight.fill_(1.0)
        layer.base.bias.zero_()
        layer.gate.scorer.norm.running_mean.fill_(2 * nn.functional.softplus(torch.zeros(())))  # of four at weight 1/2
        x = -torch.ones(1, 8, 6, 6)
        x[:, :, :3, 3:] = 1
        with record(execute(layer, sparse=True)) as trace:
            layer(x)
    assert trace[""][0][0, :, :, 0].tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_strided_convolutions_keep_the_laws_by_sample(x):
    check_equal(ChannelGating(conv(stride=2, padding=2, dilation=2, bias=False), 3, groups=2), x, draws=2)


@pytest.mark.parametrize("options", [{"groups": 4}, {"tiles": Tiles(4, 1)}])
def test_gradients_reach_thresholds_from_both_sides(x, options):
    torch.manual_seed(3)
    check_gradients(ChannelGating(conv(), 4, **options, threshold=0.0), x)


def test_the_threshold_term_pulls_towards_its_target(x):
    layer = ChannelGating(conv(), 4, threshold=0.5)
    with record(layer) as trace:
        loss = ThresholdTarget(2.0)(layer(x), None, trace)
    assert loss.item() == pytest.approx(1.5**2)
    loss.backward()
    assert (layer.thresholds.grad < 0).all()
    other = nn.Linear(2, 2)
    with record(other) as trace, pytest.raises(StructureError, match="with ChannelGating layers"):
        ThresholdTarget(2.0)(None, None, trace)


@pytest.mark.parametrize("change, says", [
    ({"base": 0}, "base is 0"),
    ({"base": 8}, "at least one of its 8 input channels"),
    ({"conv": nn.Conv2d(8, 12, 3, groups=2)}, "without grouping"),
    ({"groups": 5}, "divide the 12 output channels, got 5"),
    ({"groups": 0}, "divide the 12 output channels, got 0"),
    ({"tiles": Tiles(4, 0)}, "the halo is 0"),
    ({"conv": conv(stride=2), "tiles": Tiles(4, 1)}, "stride-1"),
])  # fmt: skip
def test_what_cannot_be_split_is_refused(change, says):
    with pytest.raises(StructureError, match=says):
        ChannelGating(**{"conv": conv(), "base": 4, **change})
