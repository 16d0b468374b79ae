import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.scorers import PooledScorer
from dynanet.mechanisms.slimmable import (
    InPlaceDistillation,
    OneWidth,
    SandwichGate,
    SlimBatchNorm2d,
    SlimConv2d,
    SlimLinear,
    Slimmable,
    SlimSequential,
    scaled,
    separate,
)
from dynanet.testing import check_equal, check_gradients

WIDTHS = (4, 8, 12)


def net(classes=5, shared=False):
    return SlimSequential(
        SlimConv2d((6, 6, 6), WIDTHS, 3),
        SlimBatchNorm2d(WIDTHS, shared=shared),
        nn.ReLU(),
        SlimConv2d(WIDTHS, WIDTHS, 3, 2, depthwise=True),
        SlimBatchNorm2d(WIDTHS, shared=shared),
        SlimConv2d(WIDTHS, WIDTHS, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        SlimLinear(WIDTHS, classes),
    )


def layer(**options):
    return Slimmable(net(**options), Gate(PooledScorer(6, 3, 4, bias=0.0), OneWidth(), units=3))


def picking(*widths):
    """Row i at width widths[i]."""
    return lambda d: nn.functional.one_hot(torch.tensor(widths), d.keep.shape[-1]).to(d.keep)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(4, 6, 7, 5)


@pytest.mark.parametrize("shared", [False, True])
def test_a_row_gets_the_answer_and_the_price_of_its_width(x, shared):
    model = layer(shared=shared)
    for _ in range(2):  # statistics that differ from width to width
        for u in range(3):
            model.at(u, x)
    execute(model.eval(), sparse=True)
    alone = [model.net.at(u).eval() for u in range(3)]
    cost = CostModel(model, x[:1])
    with torch.no_grad(), forced(model, picking(2, 0, 1, 0)), record(model) as trace:
        y = model(x)
    for i, u in enumerate((2, 0, 1, 0)):
        torch.testing.assert_close(y[i], alone[u](x[i : i + 1])[0])
        with CountMacs() as count:
            alone[u](x[:1])
        assert cost.unit[""][u].item() == count.total
        assert cost.spent(trace)[i].item() == cost.always + count.total
    assert cost.unit[""][0] < 0.5 * cost.unit[""][2]


def test_rows_of_a_width_run_together_and_other_widths_do_not_run(x, monkeypatch):
    model = execute(layer().eval(), sparse=True)
    seen = []
    at = Slimmable.at
    monkeypatch.setattr(Slimmable, "at", lambda self, u, rows: seen.append((u, len(rows))) or at(self, u, rows))
    with torch.no_grad(), forced(model, picking(2, 0, 2, 2)):
        model(x)
    assert seen == [(0, 1), (2, 3)]


def test_the_gate_keeps_one_width_per_row(x):
    for mode in (True, False):
        model = layer().train(mode)
        with record(model) as trace:
            model(x)
        keep = trace[""][0]
        torch.testing.assert_close(keep.sum(1), torch.ones(4))
        assert set(keep.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}


def test_where_no_width_is_kept_the_narrowest_runs(x):
    model = execute(layer().eval(), sparse=True)
    with torch.no_grad(), forced(model, lambda d: torch.zeros_like(d.keep)), record(model) as trace:
        torch.testing.assert_close(model(x), model.at(0, x))
    assert trace[""][0].tolist() == [[1.0, 0.0, 0.0]] * 4


def test_separate_widths_answer_and_decide_the_same(x):
    model = layer(shared=True)
    model(x)
    model.eval()
    apart = separate(model)
    assert isinstance(apart.net, nn.ModuleList) and isinstance(model.net, SlimSequential)
    with torch.no_grad():
        for forms in (execute(apart, sparse=False), execute(apart, sparse=True)):
            torch.testing.assert_close(forms(x), model(x))
    check_equal(apart, x, draws=2)
    with torch.no_grad():
        next(apart.net.parameters()).add_(1)
    assert not torch.equal(next(apart.net.parameters())[:4, :6], model.net.parts[0].weight[:4, :6])


def test_gradients_reach_the_gate(x):
    torch.manual_seed(1)
    model = layer()
    check_gradients(model, x, gates=[model.gate])


def test_the_sandwich_runs_both_ends_and_some_between(x):
    model = Slimmable(
        SlimSequential(SlimConv2d((6,) * 6, (2, 3, 4, 5, 6, 7), 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                       SlimLinear((2, 3, 4, 5, 6, 7), 3)),
        Gate(PooledScorer(6, 6, 4), OneWidth(), units=6),
    )  # fmt: skip
    model.between = 2
    drawn = set()
    for seed in range(8):
        torch.manual_seed(seed)
        with record(model.train()) as trace:
            answer = model(x)
        heard = trace.answers[""]
        assert len(heard) == 4
        torch.testing.assert_close(heard[0], model.at(0, x))
        torch.testing.assert_close(heard[-1], model.at(5, x))
        assert answer is heard[-1]
        drawn |= {u for u in range(1, 5) for a in heard[1:3] if torch.equal(a, model.at(u, x))}
    assert drawn == {1, 2, 3, 4}


def test_in_place_distillation_teaches_the_narrow_without_moving_the_wide(x):
    model, y = layer(), torch.tensor([0, 1, 2, 3])
    model.between = 1
    with record(model.train()) as trace:
        loss = InPlaceDistillation()(model(x), y, trace)
    narrow, middle, wide = trace.answers[""]
    gradients = torch.autograd.grad(loss, (narrow, middle, wide))
    taught = wide.detach().softmax(1)
    for logits, gradient in zip((narrow, middle), gradients, strict=False):
        torch.testing.assert_close(gradient, (logits.softmax(1) - taught).detach() / 4)
    labels = nn.functional.one_hot(y, 5)
    torch.testing.assert_close(gradients[2], (taught - labels) / 4)


def test_the_gate_learns_who_needs_width(x):
    wrong, right = torch.eye(5)[[0, 0, 0, 0]], torch.eye(5)[[1, 1, 1, 1]]
    y = torch.tensor([1, 1, 1, 1])
    narrow, wide = (
        torch.stack([right[0], wrong[0], wrong[0], right[0]]),
        torch.stack([right[0], right[0], wrong[0], wrong[0]]),
    )
    assert SandwichGate().targets(narrow, wide, y, 3).tolist() == [0, 2, 0, 0]
    assert SandwichGate(give_up=False).targets(narrow, wide, y, 3).tolist() == [0, 2, 2, 0]
    model = layer()
    optimizer = torch.optim.SGD(model.gate.parameters(), 0.5)
    y = torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(20):
        with record(model.train()) as trace:
            losses.append(SandwichGate()(model(x), y, trace))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_training_terms_say_what_they_need(x):
    model = layer().eval()
    with record(model) as trace:
        answer = model(x)
    with pytest.raises(StructureError, match="in train mode"):
        InPlaceDistillation()(answer, torch.zeros(4).long(), trace)


@pytest.mark.parametrize("widths", [(8, 4), (0, 4), (), (4.0, 8), (True, 2)])
def test_widths_that_fall_or_mean_nothing_are_refused(widths):
    with pytest.raises(ConfigError, match="expected ascending whole numbers"):
        SlimConv2d((3,) * len(widths), widths, 3)


@pytest.mark.parametrize("ratios", [(0.5, 0.25), (0.5, 0.5), (0.0, 1.0), (0.5, 1.5), ()])
def test_ratios_that_do_not_ascend_are_refused(ratios):
    with pytest.raises(ConfigError, match="expected ascending ratios"):
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
    with pytest.raises(StructureError, match="scores 2 widths and the net has 3"):
        Slimmable(net(), Gate(PooledScorer(6, 2), OneWidth(), units=2))


def test_one_width_draws_in_training_by_its_scores():
    torch.manual_seed(0)
    rule, score = OneWidth(), torch.tensor([0.0, 2.0, -1.0]).expand(4000, 3)
    drawn = rule.train()(score).mean(0)
    torch.testing.assert_close(drawn, score[0].softmax(0), atol=0.03, rtol=0)
    assert Decision(rule.eval()(score), score).keep[0].tolist() == [0, 1, 0]
