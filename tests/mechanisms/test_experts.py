"""What the laws do not say of experts: weights, routing, training in the sparse form, limits, and errors."""

import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.expert_rules import BatchCoupledTopK, BiasedTopK
from dynanet.gates.rules import StraightThrough, TopK
from dynanet.mechanisms.experts import Experts, RouterScorer, sigmoid_over_kept, softmax_over_all, softmax_over_kept
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.testing import check_neighbours

D, E = 6, 4


def expert(out=D):
    return nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, out))


def moe(rule, mix=None, **settings):
    torch.manual_seed(0)
    return Experts([expert() for _ in range(E)], Gate(RouterScorer(D, E), rule, units=E), mix=mix, **settings).eval()


@pytest.mark.parametrize("mix", [softmax_over_all, softmax_over_kept, sigmoid_over_kept])
def test_the_answer_is_the_weighted_sum(mix):
    model, x = moe(TopK(2), mix), torch.randn(5, D)
    score = model.gate.scorer(x)
    best = score.topk(2).indices
    affinity = {softmax_over_all: score.softmax(1), softmax_over_kept: score.exp(), sigmoid_over_kept: score.sigmoid()}
    weight = affinity[mix].gather(1, best)
    if mix is not softmax_over_all:
        weight = weight / weight.sum(1, keepdim=True)
    answers = torch.stack([e(x) for e in model.experts], 1)
    expected = torch.stack([(w[:, None] * a[b]).sum(0) for w, a, b in zip(weight, answers, best, strict=True)])
    for sparse in (False, True):
        torch.testing.assert_close(execute(model, sparse=sparse)(x), expected)


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_only_what_is_chosen_runs(rows):
    model, x = execute(moe(TopK(2), shared=expert()), sparse=True), torch.randn(rows, D)
    with torch.no_grad(), CountMacs() as count:
        assert model(x).shape == (rows, D)
    one = 2 * 8 * D
    assert count.total == rows * (2 * one + one + D * E)  # two chosen, one shared, the router


def test_padding_goes_to_no_expert():
    model, x = moe(TopK(1)), torch.randn(2, 3, D)
    present = torch.tensor([[True, True, False], [True, False, False]])
    for sparse in (False, True):
        with torch.no_grad(), record(execute(model, sparse=sparse)) as trace:
            answer = model(x, present)
        assert torch.equal(trace[""][0].sum(-1), present.float())
        assert not answer[~present].any()
        torch.testing.assert_close(answer[present], model(x)[present])
    assert CostModel(model, x).spent(trace).diff().item() == pytest.approx(-2 * 8 * D)


def test_sparse_training_has_the_gradients_of_the_dense_one():
    model, x = moe(TopK(2), softmax_over_kept).double().train(), torch.randn(9, D, dtype=torch.float64)
    gradients, macs = [], []
    for sparse in (False, True):
        execute(model, sparse=sparse).zero_grad()
        with CountMacs() as count:
            answer = model(x)
        answer.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        macs.append(count.total)
    assert gradients[0][0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)
    router = 9 * D * E
    assert macs[1] - router == (macs[0] - router) * 2 / E


def test_sparse_training_inside_a_layer_that_trains_densely():
    torch.manual_seed(0)
    gate = Gate(nn.Linear(D, 1), StraightThrough())
    model, x = LayerSkip(moe(TopK(1)), gate).double().train(), torch.randn(9, D, dtype=torch.float64)
    cost = CostModel(model, x)
    answers, spent = [], []
    for sparse in (False, True):
        with record(execute(model, sparse=sparse)) as trace:
            answers.append(model(x))
        spent.append(cost.spent(trace))
    torch.testing.assert_close(answers[0], answers[1])
    torch.testing.assert_close(spent[0], spent[1])


def test_soft_keeps_train_densely():
    model = execute(moe(StraightThrough()), sparse=True).train()
    with CountMacs() as count:
        model(torch.randn(5, D))
    assert count.total == 5 * (E * 2 * 8 * D + D * E)


@pytest.mark.parametrize("rule", [TopK(1), TopK(2), BiasedTopK(2, E), BatchCoupledTopK(1, 1.0)])
def test_gradients_reach_the_router(rule):
    model = moe(rule).train()
    model(torch.randn(7, D)).square().sum().backward()
    assert model.gate.scorer.weight.grad.abs().sum() > 0


def test_nobody_kept_answers_zero():
    model, x = moe(TopK(2), softmax_over_kept), torch.randn(3, D)
    for sparse in (False, True):
        with forced(execute(model, sparse=sparse), lambda decision: torch.zeros_like(decision.keep)):
            assert not model(x).any()


def test_experts_may_answer_another_shape():
    torch.manual_seed(0)
    gate = Gate(RouterScorer(D, 2), TopK(1), units=2)
    model = Experts([expert(3), expert(3)], gate, outputs=(3,)).eval()
    x = torch.randn(4, 5, D)
    dense, sparse = (execute(model, sparse=sparse)(x) for sparse in (False, True))
    assert dense.shape == (4, 5, 3)
    torch.testing.assert_close(sparse, dense)
    wrong = Experts([expert(3), expert(3)], gate)
    for sparse in (False, True):
        with pytest.raises(StructureError, match=r"\(3,\), expected \(6,\)"):
            execute(wrong.eval(), sparse=sparse)(x)


def test_a_capacity_couples_rows_and_the_laws_say_so():
    torch.manual_seed(0)
    x = torch.randn(8, D)
    check_neighbours(moe(TopK(1)), x)
    with pytest.raises(AssertionError, match="law 2"):
        check_neighbours(moe(BatchCoupledTopK(1, capacity=0.5)), x)


def test_half_precision_routes_in_float32():
    scorer = RouterScorer(D, E).bfloat16()
    assert scorer(torch.randn(3, D).bfloat16()).dtype == torch.float32
    assert scorer.double()(torch.randn(3, D).double()).dtype == torch.float64


def test_jitter_is_for_training_only():
    scorer, x = RouterScorer(D, E, jitter=0.1), torch.randn(3, D)
    assert not torch.equal(scorer(x), scorer(x))
    assert torch.equal(scorer.eval()(x), scorer(x))


def gate(units, rule):
    return Gate(RouterScorer(D, units), rule, units=units)


@pytest.mark.parametrize(
    ("make", "error", "what"),
    [
        (lambda: Experts([expert()] * 2, gate(2, TopK(3))), ConfigError, "k = 3"),
        (lambda: Experts([expert()] * 2, gate(2, BatchCoupledTopK(3, 1.0))), ConfigError, "k = 3"),
        (lambda: Experts([expert()] * 2, gate(2, TopK(1)), mix=softmax_over_kept), ConfigError, "always 1"),
        (lambda: Experts([expert()] * 2, gate(3, TopK(1))), StructureError, "3 units"),
        (lambda: Experts([], gate(3, TopK(1))), StructureError, "at least one"),
        (lambda: RouterScorer(D, E, jitter=1.0), ConfigError, "jitter"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(make, error, what):
    with pytest.raises(error, match=what):
        make()


def test_a_gate_of_ones_own():
    class Alternate(nn.Module):
        def forward(self, x):
            keep = torch.nn.functional.one_hot(torch.arange(x.shape[0]) % 2, 2).to(x.dtype)
            return Decision(keep, keep)

    model = execute(
        Experts([nn.Identity(), nn.Identity()], Alternate(), mix=lambda score, keep: 1 + score).eval(), sparse=True
    )
    torch.testing.assert_close(model(torch.ones(4, D)), torch.full((4, D), 2.0))


def test_autocast_routes_in_float32_too():
    with torch.autocast("cpu", torch.bfloat16):
        assert RouterScorer(D, E)(torch.randn(3, D)).dtype == torch.float32


@pytest.mark.parametrize("rule", [lambda: BiasedTopK(1, E, rate=0.02), lambda: BatchCoupledTopK(1, capacity=0.5)])
def test_padding_is_not_counted(rule):
    torch.manual_seed(0)
    with_padding, without = moe(rule()).train(), moe(rule()).train()
    without.load_state_dict(with_padding.state_dict())
    x = torch.randn(2, 6, D)
    present = torch.ones(2, 6)
    present[1, 2:] = 0
    with record(with_padding) as padded:
        answer = with_padding(x, present=present)
    with record(without) as alone:
        expected = without(x[present > 0])
    name = next(iter(padded.keys()))
    assert torch.equal(padded[name][0][present > 0], alone[name][0])
    torch.testing.assert_close(answer[present > 0], expected)
    for mine, theirs in zip(with_padding.buffers(), without.buffers(), strict=True):
        assert torch.equal(mine, theirs)


@torch.no_grad()
def test_packed_weights_follow_the_weights():
    torch.manual_seed(0)
    model, x = execute(frozen(), sparse=True), torch.randn(5, D)
    model(x)
    inside = model.experts[0][0]

    def agrees():
        torch.testing.assert_close(execute(model, sparse=True)(x), execute(model, sparse=False)(x))

    inside.weight.mul_(3)
    agrees()
    inside.weight.data = torch.randn_like(inside.weight)
    agrees()
    model.experts[1][2] = nn.Linear(2 * D, D).requires_grad_(False)
    agrees()
    heard = []
    hook = inside.register_forward_hook(lambda *call: heard.append(call))
    execute(model, sparse=True)(x)
    assert heard
    hook.remove()
    del heard[:]
    agrees()
    assert not heard


def frozen():
    experts = [nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D)) for _ in range(E)]
    return Experts(experts, Gate(RouterScorer(D, E), TopK(2), units=E)).eval().requires_grad_(False)
