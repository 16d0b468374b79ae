import pytest
import torch
from torch import nn

from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import BudgetError, ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import RelaxedTopK, Sigmoid, Threshold
from dynanet.mechanisms.path_select import PathBalance, PathSelect, averaged, by_score, price_for, summed
from dynanet.session.session import Session
from dynanet.testing import check_gradients
from dynanet.train.objectives import BudgetPenalty, CrossEntropy
from dynanet.train.schedules import anneal_temperature, exponential

D = 12


def mlp(width):
    return nn.Sequential(nn.Linear(D, width), nn.ReLU(), nn.Linear(width, 3))


def paths(rule, **settings):
    return PathSelect([mlp(4), mlp(16), mlp(64)], Gate(nn.Linear(D, 3), rule, units=3), **settings)


def one_by_one(model, x):
    """What the layer answers, by a loop over rows that knows the scores and no framework."""
    rows = []
    for row in x:
        score = model.gate.scorer(row)
        best = score.topk(model.gate.rule.k).indices
        share = score[best].softmax(0) if model.mix is by_score else torch.full_like(score[best], 1 / len(best))
        rows.append(sum(s * model.branches[b](row) for s, b in zip(share, best.tolist(), strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("mix", [averaged, by_score])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_rows_take_their_best_branches(k, mix):
    torch.manual_seed(0)
    model, x = paths(RelaxedTopK(k), mix=mix).double().eval(), torch.randn(20, D).double()
    for sparse in (False, True):
        with record(execute(model, sparse=sparse)) as trace:
            torch.testing.assert_close(model(x), one_by_one(model, x), rtol=1e-12, atol=1e-12)
        assert (trace[""][0].sum(1) == k).all()
        assert trace[""][0].mean(0).min() > 0 or k == 1


@pytest.mark.parametrize(
    "rule", [RelaxedTopK(), RelaxedTopK(hard=True), RelaxedTopK(2, noise=True), RelaxedTopK(2, noise=True, hard=True)]
)
@pytest.mark.parametrize("mix", [averaged, by_score, summed])
def test_gradients_reach_the_gate(rule, mix):
    torch.manual_seed(0)
    model = paths(rule, mix=mix)
    check_gradients(model, torch.randn(9, D), gates=[model.gate])


@pytest.mark.parametrize("otherwise", [None, nn.Linear(D, 3)])
def test_gradients_of_the_sparse_form_are_those_of_the_dense_one(otherwise):
    """Fine-tuning in eval mode; the sparse form adds in place."""
    torch.manual_seed(0)
    model, x = paths(RelaxedTopK(2), mix=by_score, otherwise=otherwise).double().eval(), torch.randn(9, D).double()
    gradients = []
    for sparse in (False, True):
        y = execute(model, sparse=sparse)(x)
        gradients.append(torch.autograd.grad((y * y).sum(), list(model.branches.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


def test_only_the_rows_that_take_a_branch_run_it():
    torch.manual_seed(0)
    model, x = execute(paths(RelaxedTopK()).eval(), sparse=True), torch.randn(40, D)
    cost = CostModel(model, x[:1])
    prices = [D * w + 3 * w for w in (4, 16, 64)]
    assert cost.unit[""].tolist() == prices and cost.always == 3 * D
    with torch.no_grad(), record(model) as trace, CountMacs() as count:
        model(x)
    taken = trace[""][0].sum(0)
    assert count.total == 40 * 3 * D + (taken * torch.tensor(prices)).sum()
    assert count.total == cost.spent(trace).sum()
    assert (taken > 0).all()  # or nothing were selected


def test_softness_falls_with_the_temperature_to_the_hard_choice():
    torch.manual_seed(0)
    score = torch.randn(50, 5).double()
    for k in (1, 2, 4):
        rule, before = RelaxedTopK(k), torch.inf
        anneal = anneal_temperature(rule, exponential(10.0, 1e-3))
        hard = rule.eval()(score)
        rule.train()
        for progress in (0.0, 0.5, 1.0):
            anneal(progress)
            keep = rule(score)
            torch.testing.assert_close(keep.sum(1), torch.full((50,), float(k)).double())
            assert 0 <= keep.min() and keep.max() <= 1 + 1e-6
            distance = (keep - hard).abs().mean().item()
            assert distance < before
            before = distance
        assert before < 0.01


def test_the_gradient_of_the_relaxed_choice():
    """The threshold moves with the scores: against finite differences, and the sum must not change."""
    torch.manual_seed(0)
    score = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    for k in (1, 2, 4):
        assert torch.autograd.gradcheck(RelaxedTopK(k, temperature=0.7), score)
        (moved,) = torch.autograd.grad(RelaxedTopK(k)(score).sum(), score)
        torch.testing.assert_close(moved, torch.zeros_like(moved))


def test_noise_draws_branches_as_often_as_the_softmax_says():
    """Gumbel-max: for k = 1 the hard choices are samples of softmax(score)."""
    torch.manual_seed(0)
    score = torch.tensor([1.0, 0.0, -1.0])
    drawn = RelaxedTopK(noise=True, hard=True)(score.expand(20_000, -1)).mean(0)
    torch.testing.assert_close(drawn, score.softmax(0), rtol=0, atol=0.02)


def test_no_branch_leaves_what_is_put_in_its_place():
    x, otherwise = torch.randn(6, D), nn.Linear(D, 3)
    model = PathSelect([mlp(4), mlp(8)], Gate(nn.Linear(D, 2), Threshold(), units=2), mix=summed, otherwise=otherwise)
    for sparse in (False, True):
        execute(model.eval(), sparse=sparse)
        with forced(model, lambda d: torch.zeros_like(d.keep)):
            torch.testing.assert_close(model(x), otherwise(x))
            model.otherwise = None
            assert model(x).tolist() == [[0.0] * 3] * 6
            model.otherwise = otherwise
        with forced(model, lambda d: torch.ones_like(d.keep)):
            torch.testing.assert_close(model(x), model.branches[0](x) + model.branches[1](x))
        assert model(x[:0]).shape == (0, 3)


def test_mixes_of_far_scores_are_finite():
    """A branch that is kept although its score is hopeless still answers, and nothing becomes infinite."""
    score = torch.tensor([[200.0, -200.0, 0.0]])
    for keep in ([0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]):
        factor = by_score(Decision(torch.tensor([keep]), score))
        assert factor.isfinite().all()
        assert (factor * torch.tensor([keep])).sum() == float(any(keep))


def test_a_gate_learns_where_its_branches_are_good_and_what_they_cost():
    """Rows of two kinds; branch 0 can do the first only, branch 1 (dear) both. Training should find that out."""
    torch.manual_seed(0)

    class Kind(nn.Module):
        def __init__(self, knows, width) -> None:
            super().__init__()
            self.knows, self.cost = knows, nn.Linear(D, width, bias=False)

        def forward(self, x):
            right = 4 * torch.stack([x[:, 1], -x[:, 1]], 1)
            return right * ((x[:, :1] > 0) | self.knows) + 0 * self.cost(x).sum(1, keepdim=True)

    x = torch.randn(256, D)
    y = (x[:, 1] < 0).long()
    model = PathSelect(
        [Kind(False, 4), Kind(True, 64)], Gate(nn.Linear(D, 2), RelaxedTopK(noise=True, hard=True), units=2)
    )
    cost = CostModel(model, x[:1])
    objective = CrossEntropy() + 5.0 * BudgetPenalty(Budget(macs=0.6 * cost.full), cost)
    anneal = anneal_temperature(model, exponential(2.0, 0.5))
    optimizer = torch.optim.Adam(model.gate.parameters(), 0.1)
    for step in range(60):
        anneal(step / 60)
        with record(model.train()) as trace:
            loss = objective(model(x), y, trace)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with record(model.eval()) as trace:
        right = (model(x).argmax(1) == y).float().mean()
    dear = trace[""][0][:, 1]
    assert right > 0.95
    assert dear[x[:, 0] < 0].mean() > 0.9 and dear[x[:, 0] > 0].mean() < 0.3


def test_the_price_serves_every_budget_after_training():
    torch.manual_seed(0)
    model, x = paths(RelaxedTopK(costs=[0.0, 0.0, 0.0])).eval(), torch.randn(200, D)
    cost = CostModel(model, x[:1])
    rule = model.gate.rule
    rule.costs.copy_(cost.unit[""] / cost.unit[""].max())
    with torch.no_grad():
        scores = model.gate.scorer(x)
    rates = []
    for mean in (1.0, 0.4, 0.2, rule.costs.min().item()):
        price = price_for(scores, rule.costs, mean)
        rule.price.fill_(price)
        with torch.no_grad(), record(model) as trace:
            model(x)
        rates.append((trace[""][0] @ rule.costs).mean().item())
        assert rates[-1] <= mean + 1e-6
        rule.price.fill_(0.98 * price)
        assert price == 0 or (rule(scores) @ rule.costs).mean() > mean - 0.05  # no more is saved than was asked
    assert rates[0] > rates[1] > rates[2] > rates[3]
    fresh = paths(RelaxedTopK(costs=[0.0, 0.0, 0.0]))
    fresh.load_state_dict(model.state_dict())
    assert fresh.gate.rule.price == rule.price and fresh.gate.rule.costs.tolist() == rule.costs.tolist()


def test_balance_is_zero_when_balanced_and_pushes_towards_it():
    torch.manual_seed(0)
    model, x = paths(RelaxedTopK()), torch.randn(64, D)
    with record(model) as trace:
        penalty = PathBalance(0.5)(model(x), None, trace)
    taken = trace[""][0].mean(0)
    torch.testing.assert_close(penalty, 0.5 * taken.var(correction=0) / taken.mean() ** 2)
    penalty.backward()
    assert model.gate.scorer.weight.grad.abs().sum() > 0
    nn.init.zeros_(model.gate.scorer.weight)
    nn.init.zeros_(model.gate.scorer.bias)
    with record(model) as trace:
        both = (CrossEntropy() + PathBalance())(model(x), torch.zeros(64, dtype=torch.long), trace)
        alone = CrossEntropy()(model(x), torch.zeros(64, dtype=torch.long), trace)
    torch.testing.assert_close(both, alone)
    with record(nn.Linear(1, 1)) as trace, pytest.raises(StructureError, match="model with PathSelect layers"):
        PathBalance()(None, None, trace)


def test_a_session_answers_the_same():
    torch.manual_seed(0)
    model, x = paths(RelaxedTopK(2), mix=by_score).eval(), torch.randn(7, D)
    session = Session(model, x, engines="eager")
    with record(model) as dense:
        y = model(x)
    with record(session) as sparse:
        torch.testing.assert_close(session(x), y)
    cost = CostModel(model, x)
    torch.testing.assert_close(cost.spent(sparse), cost.spent(dense))


WRONG = {
    "one branch": (StructureError, "1 branches", lambda: PathSelect([mlp(4)], nn.Linear(D, 1))),
    "a gate for two": (
        StructureError,
        "2 units; expected 3",
        lambda: PathSelect([mlp(4)] * 3, Gate(nn.Linear(D, 2), Sigmoid(), 2)),
    ),
    "k of too few": (ConfigError, "k = 4 but there are only 3", lambda: paths(RelaxedTopK(4))),
    "costs of two": (ConfigError, "2 costs for 3 units", lambda: paths(RelaxedTopK(costs=[1.0, 2.0]))),
    "no branch": (ConfigError, "k must be at least 1, got 0", lambda: RelaxedTopK(0)),
    "frozen": (ConfigError, "temperature must be above 0", lambda: RelaxedTopK(temperature=0.0)),
    "a gift": (ConfigError, "0 or more", lambda: RelaxedTopK(costs=[1.0, -2.0])),
    "costs of nothing": (ConfigError, "finite", lambda: RelaxedTopK(costs=[1.0, float("nan")])),
    "a budget below all": (BudgetError, "below the 3", lambda: price_for(torch.randn(4, 3), [1.0, 2.0, 5.0], 2.5, k=2)),
    "annealed to zero": (ConfigError, "temperature must be above 0", lambda: annealed_to_zero()),
}


def annealed_to_zero():
    rule = RelaxedTopK()
    rule.temperature = 0.0
    rule(torch.zeros(1, 2))


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    error, message, build = WRONG[case]
    with pytest.raises(error, match=message):
        build()
