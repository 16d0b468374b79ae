import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import StraightThrough, Threshold
from dynanet.gates.scorers import PooledScorer
from dynanet.mechanisms.channel_skip import ChannelSkip, SaliencyL1, SaliencyScorer, fbs_gate
from dynanet.testing import check_equal, random_decisions


def gate(channels, groups, rule=None):
    return Gate(PooledScorer(channels, groups, hidden=0, bias=0.0), rule or Threshold(), units=groups)


def boosted(density=0.5, groups=(4, 8, 2)):
    """An image of 3 channels, a stride, a 1x1 convolution, pools, batch norms with statistics that differ."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 12, 3, stride=2, padding=1)]
    norms = [nn.BatchNorm2d(8), None, nn.BatchNorm2d(12)]
    for norm in (norms[0], norms[2]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.bias.data.normal_()
    afters = [nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1)), nn.ReLU(), nn.Identity()]
    gates = [fbs_gate(conv.in_channels, n, density) for conv, n in zip(convs, groups, strict=True)]
    return ChannelSkip(convs, gates, groups, norms=norms, afters=afters, boost=True).eval()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(5, 3, 9, 7)


def test_the_answer_is_the_papers_formula(x):
    """relu(wta(g) * (norm(conv) + beta)), convolution after convolution."""
    model = boosted(groups=(8, 8, 12))
    y = x
    with torch.no_grad():
        for conv, norm, after, g in zip(model.convs, model.norms, model.afters, model.gates, strict=True):
            saliency = (y.abs().mean((2, 3)) @ g.scorer.map.weight.T + g.scorer.map.bias).relu()
            lost = saliency.argsort(1)[:, : saliency.shape[1] // 2]
            y = after(norm(conv(y)) * saliency.scatter(1, lost, 0.0)[..., None, None])
        for sparse in (False, True):
            torch.testing.assert_close(execute(model, sparse=sparse)(x), y)


def test_what_runs_are_the_kept_blocks_of_every_weight_matrix(x):
    model = execute(boosted(), sparse=True)
    cost = CostModel(model, x[:1])
    with torch.no_grad(), forced(model, random_decisions(1)), record(model) as trace:
        model(x)
    came = torch.ones(5, 1)
    for i, keep in enumerate(trace[""]):
        blocks = keep.unflatten(1, (came.shape[1], -1))
        kept = blocks.amax(1) if i else keep
        torch.testing.assert_close(blocks, came[:, :, None] * kept[:, None, :] if i else blocks)
        came = kept
    with torch.no_grad(), forced(model, random_decisions(1)), CountMacs() as count:
        model(x)
    assert count.total == cost.spent(trace).sum().item()
    assert count.total < 0.8 * cost.full * 5


def test_density_squares(x):
    """Between two gated convolutions a density of 1/2 leaves a quarter."""
    model = boosted(0.5)
    cost, macs = CostModel(model, x[:1]), []
    with torch.no_grad(), record(model) as trace:
        model(x)
    for call in trace.calls:
        prices = cost.unit[""][call.first : call.first + call.keep.shape[1]]
        macs.append(((call.keep.double() * prices).sum(1) / prices.sum()).tolist())
    assert macs == [[0.5] * 5, [0.25] * 5, [0.25] * 5]


def test_groups_of_any_number_keep_the_laws(x):
    check_equal(boosted(groups=(2, 1, 12)), x, draws=3)
    many = ChannelSkip([nn.Conv2d(3, 40, 1), nn.Conv2d(40, 40, 1)], [gate(3, 40), gate(40, 40)], 40)
    check_equal(many, x, draws=2)  # 80 decisions are more than fit a whole number


def test_rows_that_choose_alike_run_together(x, monkeypatch):
    model, seen = execute(boosted(), sparse=True), []
    conv2d = nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda t, *rest: seen.append(tuple(t.shape[:2])) or conv2d(t, *rest))
    alike = lambda d: torch.arange(d.keep.shape[1]).lt(d.keep.shape[1] / 2).to(d.keep).expand_as(d.keep)  # noqa: E731
    with torch.no_grad(), forced(model, alike):
        model(x)
    assert seen == [(5, 3), (5, 4), (5, 4)]


def test_saliencies_learn_from_the_answer_and_scales_do_not(x):
    model = boosted().train()
    with record(model) as trace:
        answer = model(x)
    (answer.square().sum() + SaliencyL1()(answer, None, trace)).backward()
    assert all(g.scorer.map.weight.grad.abs().sum() > 0 for g in model.gates)
    assert all(n.weight.grad is None and n.bias.grad is not None for n in (model.norms[0], model.norms[2]))


def test_the_l1_term_is_the_sum_of_mean_saliencies(x):
    model = boosted()
    with torch.no_grad(), record(model) as trace:
        model(x)
        expected = sum(call.decision.score.sum() / 5 for call in trace.calls)
        torch.testing.assert_close(SaliencyL1()(None, None, trace), expected)
    plain = ChannelSkip([nn.Conv2d(3, 4, 1)], [gate(3, 2, StraightThrough())], 2)
    with record(plain) as trace:
        plain(x)
    with pytest.raises(StructureError, match="expected a ChannelSkip with boost"):
        SaliencyL1()(None, None, trace)


@pytest.mark.parametrize("density", [0, -0.5, 1.5, float("nan")])
def test_a_density_outside_0_to_1_is_refused(density):
    with pytest.raises(ConfigError, match="density"):
        fbs_gate(4, 4, density)


@pytest.mark.parametrize("density, kept", [(0.01, 1), (0.5, 5), (0.51, 6), (0.7, 7), (1.0, 10)])
def test_a_density_keeps_its_share_rounded_up(density, kept):
    assert fbs_gate(4, 10, density)(torch.randn(3, 4, 2, 2)).keep.sum(1).tolist() == [kept] * 3


@pytest.mark.parametrize("change, says", [
    ({"groups": 3}, "cut into 1 and 3 groups"),
    ({"groups": 0}, "cut into 1 and 0 groups"),
    ({"groups": (4, 3)}, "cut into 4 and 3 groups"),
    ({"groups": (4,)}, "one gate, norm and layer"),
    ({"convs": []}, "got 0 convolutions"),
    ({"gates": [gate(4, 4)]}, "1 gates"),
    ({"gates": [gate(4, 4), gate(8, 2)]}, "2 units; expected 4"),
    ({"norms": [None, nn.BatchNorm2d(4)]}, "a norm after 8 channels"),
    ({"norms": [None, nn.BatchNorm2d(8, track_running_stats=False)]}, "keep statistics"),
    ({"afters": [nn.ReLU(), nn.Sigmoid()]}, "Sigmoid cannot follow"),
    ({"afters": [nn.ReLU(), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8))]}, "BatchNorm2d cannot follow"),
    ({"convs": [nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2)]}, "without grouping"),
    ({"convs": [nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, padding="same")]}, "padded with zeros"),
])  # fmt: skip
def test_what_cannot_be_cut_into_blocks_is_refused(change, says):
    good = {"convs": [nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)], "gates": [gate(4, 4), gate(8, 4)], "groups": 4}
    ChannelSkip(**good)
    with pytest.raises(StructureError, match=says):
        ChannelSkip(**{**good, **change})


def test_relative_saliencies_do_not_hang_on_the_scale():
    scorer, x = SaliencyScorer(6, 4, relative=True), torch.randn(3, 6, 5, 5)
    torch.testing.assert_close(scorer(100 * x), scorer(x))
    assert torch.isfinite(scorer(0 * x)).all()
