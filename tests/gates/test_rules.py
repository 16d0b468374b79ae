import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.gates.expert_rules import BatchCoupledTopK, BiasedTopK
from dynanet.gates.rules import (
    Bernoulli,
    BinaryRule,
    Gumbel,
    OneOf,
    RelaxedTopK,
    Rule,
    Sigmoid,
    StraightThrough,
    Threshold,
    TopK,
)

RULES = {
    "threshold": Threshold(),
    "threshold elsewhere": Threshold(0.7),
    "top-k": TopK(2),
    "straight-through": StraightThrough(),
    "straight-through elsewhere": StraightThrough(at=-0.3, temperature=0.5),
    "gumbel": Gumbel(0.7),
    "bernoulli": Bernoulli(),
    "soft": Sigmoid(2.0),
    "pick": RelaxedTopK(),
    "pick two of noise, hard": RelaxedTopK(2, noise=True, hard=True),
    "one of": OneOf(),
}
HARD_IN_TRAINING = sorted(RULES.keys() - {"soft", "pick"})


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_every_rule_is_held_to_these_laws():
    classes = Rule.__subclasses__() + BinaryRule.__subclasses__()
    ours = {rule for rule in classes if rule.__module__ == "dynanet.gates.rules"} - {BinaryRule}
    assert {type(rule) for rule in RULES.values()} == ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_keep_has_the_shape_and_dtype_of_the_scores(name, dtype):
    for rule in (RULES[name].train(), RULES[name].eval()):
        for lead in ((5,), (2, 3), (0,)):
            score = torch.randn(*lead, 4).to(dtype)
            keep = rule(score)
            assert keep.shape == score.shape and keep.dtype == dtype


@pytest.mark.parametrize("name", RULES)
def test_eval_is_hard_deterministic_and_row_by_row(name):
    rule, score = RULES[name].eval(), torch.randn(200, 4)
    keep = rule(score)
    assert set(keep.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(rule(score), keep)
    assert torch.equal(torch.cat([rule(row[None]) for row in score]), keep)


@pytest.mark.parametrize("name", HARD_IN_TRAINING)
def test_training_is_hard_to_the_last_bit(name):
    """A keep of 0.99999994 would weigh what it should choose."""
    keep = RULES[name].train()(torch.randn(5000, 4))
    assert set(keep.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("name", ["threshold", "straight-through", "gumbel", "bernoulli", "soft"])
def test_a_unit_is_kept_where_its_score_is_above_zero(name):
    keep = RULES[name].eval()(torch.tensor([[-1e9, -1e-9, 0.0, 1e-9, 1e9, -torch.inf, torch.inf]]))
    assert keep.tolist() == [[0, 0, 0, 1, 1, 0, 1]]


@pytest.mark.parametrize(("rule", "at"), [(Threshold(0.7), 0.7), (StraightThrough(at=-0.3, temperature=0.5), -0.3)])
def test_a_threshold_may_lie_elsewhere(rule, at):
    keep = rule.eval()(torch.tensor([[at - 1e-3, at + 1e-3]]))
    assert keep.tolist() == [[0, 1]]


@pytest.mark.parametrize("name", ["straight-through", "straight-through elsewhere", "soft"])
def test_the_gradient_is_that_of_a_sigmoid(name):
    rule = RULES[name].train()
    score = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    rule(score).sum().backward()
    p = ((score.detach() - getattr(rule, "at", 0.0)) / rule.temperature).sigmoid()
    assert torch.allclose(score.grad, p * (1 - p) / rule.temperature, rtol=1e-12)


def test_the_gradient_of_gumbel_is_that_of_the_sigmoid_it_sampled():
    rule, score = Gumbel(0.5).train(), torch.randn(50, 1, dtype=torch.float64, requires_grad=True)
    keep = rule(score)
    keep.sum().backward()
    slope = score.grad * rule.temperature  # p (1 - p) of the relaxed sample
    assert (slope > 0).all() and (slope <= 0.25).all()


@pytest.mark.parametrize("name", ["threshold", "top-k", "one of", "bernoulli"])
def test_other_rules_pass_no_gradient(name):
    score = torch.randn(5, 4, requires_grad=True)
    assert not RULES[name].train()(score).requires_grad


@pytest.mark.parametrize("rule", [Gumbel(), Gumbel(5.0), Bernoulli()])
def test_a_sampled_rule_keeps_with_the_probability_of_its_score(rule):
    """The temperature softens the gradient, not the sample."""
    score = torch.tensor([-2.0, 0.0, 1.0])
    rate = rule.train()(score.expand(20000, 3)).mean(0)
    assert torch.allclose(rate, score.sigmoid(), atol=0.02)


def test_log_prob_is_that_of_the_sample_and_safe_at_the_ends():
    score = torch.tensor([[-3.0, 0.5, 200.0, -200.0]], requires_grad=True)
    kept, left = Bernoulli.log_prob(score, torch.ones(1, 4)), Bernoulli.log_prob(score, torch.zeros(1, 4))
    p = score.detach().double().sigmoid()
    assert torch.allclose(kept.exp().double(), p, rtol=1e-5)
    assert torch.allclose(left.exp().double(), 1 - p, rtol=1e-5, atol=1e-7)
    (kept + left).sum().backward()
    assert score.grad.isfinite().all()


def test_one_of_draws_from_the_softmax():
    torch.manual_seed(0)
    score = torch.tensor([0.0, 1.0, -1.0, 2.0])
    keep = OneOf().train()(score.expand(20_000, 4))
    assert torch.equal(keep.sum(1), torch.ones(20_000))
    torch.testing.assert_close(keep.mean(0), score.softmax(0), rtol=0, atol=0.015)
    assert OneOf().eval()(score[None]).tolist() == [[0, 0, 0, 1]]
    torch.testing.assert_close(OneOf.log_prob(score.expand(4, 4), torch.eye(4)), score.log_softmax(0))


@given(st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_top_k_keeps_the_k_best_of_every_row_ties_or_not(k, seed):
    score = torch.randint(0, 4, (7, 6), generator=torch.Generator().manual_seed(seed)).float()
    keep = TopK(k)(score)
    assert (keep.sum(1) == k).all()
    worst_kept = score.masked_fill(keep == 0, torch.inf).amin(1)
    best_left = score.masked_fill(keep == 1, -torch.inf).amax(1)
    assert (worst_kept >= best_left).all()


def test_top_k_refuses_what_cannot_be_kept():
    with pytest.raises(ConfigError, match="k must be at least 1, got 0"):
        TopK(0)
    with pytest.raises(ConfigError, match="k = 3 but there are only 2"):
        TopK(3)(torch.randn(5, 2))


@pytest.mark.parametrize(
    "rule, words",
    [
        (TopK(3), "k = 3"), (RelaxedTopK(3), "k = 3"), (BiasedTopK(1, 4), "4 experts"),
        (BatchCoupledTopK(3, 1.0), "k = 3"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_gate_is_not_made_with_a_rule_for_other_units(rule, words):
    with pytest.raises(ConfigError, match=words):
        Gate(nn.Linear(4, 2), rule, units=2)


def test_a_gate_refuses_scores_without_units():
    with pytest.raises(StructureError, match=r"shape \(2,\)"):
        Gate(nn.Flatten(0), Threshold(), units=2)(torch.randn(2, 1))


@pytest.mark.parametrize("rule", [StraightThrough, Gumbel, Sigmoid, RelaxedTopK])
def test_temperatures_are_above_0(rule):
    with pytest.raises(ConfigError, match="temperature"):
        rule(temperature=0.0)
