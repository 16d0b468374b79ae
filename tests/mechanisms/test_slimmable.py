import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import RelaxedTopK
from dynanet.gates.scorers import PooledScorer
from dynanet.mechanisms.slimmable import (
    DoubleHead,
    EnsembleBootstrapping,
    InPlaceDistillation,
    SandwichGate,
    Slimmable,
    separate,
)
from dynanet.nets.slim import SlimBatchNorm2d, SlimConv2d, SlimLinear, SlimSequential
from dynanet.session import Session
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
    return Slimmable(net(**options), Gate(PooledScorer(6, 3, 4, bias=0.0), RelaxedTopK(noise=True, hard=True), units=3))


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


def test_rows_of_a_width_run_together_and_other_widths_do_not_run(x):
    model = execute(layer().eval(), sparse=True)
    seen = []
    model.net.register_forward_pre_hook(lambda net, inputs: seen.append((inputs[1], len(inputs[0]))))
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
        Gate(PooledScorer(6, 6, 4), RelaxedTopK(noise=True, hard=True), units=6),
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


def test_a_moving_average_teaches_all_but_the_widest(x):
    """By hand: the average after one step, its answers at the widths that were drawn, and who learns from which."""
    model, y = layer(), torch.tensor([0, 1, 2, 3])
    model.between = 1
    model.bootstrap(0.75)
    old = [p.clone() for p in model.target.parameters()]
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(torch.randn_like(p))
    with record(model.train()) as trace:
        loss = EnsembleBootstrapping()(model(x), y, trace)
    for average, was, weight in zip(model.target.parameters(), old, model.net.parameters(), strict=True):
        torch.testing.assert_close(average, 0.75 * was + 0.25 * weight)
    narrow, middle, wide, taught_middle, taught_wide = trace.answers[""]
    torch.testing.assert_close(taught_wide, model.target(x, 2))
    assert not taught_middle.requires_grad and not torch.equal(taught_middle, middle)
    gradients = torch.autograd.grad(loss, (narrow, middle, wide))
    wanted = ((taught_middle.softmax(1) + taught_wide.softmax(1)) / 2, taught_wide.softmax(1), torch.eye(5)[y])
    for logits, gradient, target in zip((narrow, middle, wide), gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, (logits.softmax(1) - target).detach() / 4)
    model.eval()
    with torch.no_grad(), record(model) as trace:
        held_out = EnsembleBootstrapping()(model(x), y, trace)
        torch.testing.assert_close(held_out, nn.functional.cross_entropy(model.at(2, x), y))
    assert separate(model).target is None
    model.train().target = None
    with record(model) as trace, pytest.raises(StructureError, match="no moving average"):
        EnsembleBootstrapping()(model(x), y, trace)


def test_attention_starts_as_nothing_and_then_reaches_every_width(x):
    model = Slimmable(net(), Gate(DoubleHead(6, 3), RelaxedTopK(noise=True, hard=True), units=3)).eval()
    with torch.no_grad():
        plain = [model.net(x, u) for u in range(3)]
        for u in range(3):
            torch.testing.assert_close(model.at(u, x), plain[u])
        scorer = model.gate.scorer
        scorer.attention.bias.copy_(torch.tensor([-9.0, 0, 0, 0, 0, 9]))
        louder = x * torch.tensor([0.0, 1, 1, 1, 1, 2])[:, None, None]
        for sparse in (False, True):
            with forced(execute(model, sparse=sparse), picking(2, 0, 1, 0)):
                y = model(x)
            for i, u in enumerate((2, 0, 1, 0)):
                torch.testing.assert_close(y[i], model.net(louder[i : i + 1], u)[0])


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
    heard = [right.repeat(2, 1), right.repeat(2, 1), right.repeat(2, 1)]
    heard[0][:2] = wrong[:2]  # two of eight need width
    for balanced in (False, True):
        with record(model.train()) as trace:
            model(x.repeat(2, 1, 1, 1))
        trace.answers[""] = heard
        loss = SandwichGate(balanced=balanced)(None, y.repeat(2), trace)
        score = trace.calls[0].decision.score
        (gradient,) = torch.autograd.grad(loss, score)
        wanted = torch.tensor([2, 2, 0, 0, 0, 0, 0, 0])
        weights = torch.tensor([1 / 6, 1, 1 / 2])[wanted] if balanced else torch.ones(8)
        expected = (score.softmax(1) - torch.eye(3)[wanted]) * (weights / weights.sum())[:, None]
        torch.testing.assert_close(gradient, expected.detach())
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
    model = execute(layer().eval(), sparse=True)
    with record(model) as trace:
        answer = model(x)
    with pytest.raises(StructureError, match="in train mode"):
        InPlaceDistillation()(answer, torch.zeros(4).long(), trace)


def test_one_width_draws_in_training_by_its_scores():
    torch.manual_seed(0)
    rule, score = RelaxedTopK(noise=True, hard=True), torch.tensor([0.0, 2.0, -1.0]).expand(4000, 3)
    drawn = rule.train()(score).mean(0)
    torch.testing.assert_close(drawn, score[0].softmax(0), atol=0.03, rtol=0)
    assert Decision(rule.eval()(score), score).keep[0].tolist() == [0, 1, 0]


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(StructureError, match="2 units; expected 3, the number of widths"):
        Slimmable(net(), Gate(PooledScorer(6, 2), RelaxedTopK(noise=True, hard=True), units=2))
    with pytest.raises(ConfigError, match="decay must be"):
        layer().bootstrap(1.0)


def test_a_session_attends_too(x):
    heads = DoubleHead(6, 3)
    nn.init.normal_(heads.attention.weight)
    model = Slimmable(net(), Gate(heads, RelaxedTopK(), units=3)).eval()
    with torch.no_grad():
        torch.testing.assert_close(Session(model, x[:1], engines="eager")(x), execute(model, sparse=False)(x))
