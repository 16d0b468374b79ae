import math

import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, layers, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import Gumbel, RelaxedTopK, Sigmoid, StraightThrough, TopK
from dynanet.mechanisms.soft_tree import (
    Forest,
    LeafClassifier,
    LeafCrossEntropy,
    LeafDistribution,
    RouteBalance,
    SoftTree,
    expected,
    full_tree,
    mixture,
    soft_decision_tree,
)
from dynanet.session.session import Session
from dynanet.train.objectives import CrossEntropy

D, CLASSES = 6, 3


def node(left, right, **settings):
    return SoftTree(Gate(nn.Linear(D, 1), Sigmoid()), left, right, **settings)


def leaf():
    return LeafClassifier(nn.Linear(D, CLASSES))


def crooked(mix=mixture):
    """A leaf at depth 1, two at 2 and 3, and a transformer on the way to the deepest."""
    deep = node(leaf(), leaf(), before=nn.Sequential(nn.Linear(D, D), nn.Tanh()), mix=mix)
    return node(leaf(), node(leaf(), deep, mix=mix), mix=mix)


def paths(tree, x):
    """(log-probability of the path, the leaf's answer) for every leaf, by recursion, with no framework."""
    if not isinstance(tree, SoftTree):
        return [(torch.zeros(len(x)).to(x), tree(x))]
    x = tree.before(x)
    score = tree.gate.scorer(x)[:, 0] / tree.gate.rule.temperature
    sides = [(nn.functional.logsigmoid(-score), tree.left), (nn.functional.logsigmoid(score), tree.right)]
    return [(log_p + below, answer) for log_p, child in sides for below, answer in paths(child, x)]


def test_in_training_every_leaf_counts_with_its_probability():
    torch.manual_seed(0)
    x = torch.randn(20, D).double()
    for mix in (mixture, expected):
        tree = crooked(mix).double().train()
        logs, answers = (torch.stack(t, 1) for t in zip(*paths(tree, x), strict=True))
        torch.testing.assert_close(logs.exp().sum(1), torch.ones(20).double())
        wanted = (
            (logs[..., None] + answers).logsumexp(1) if mix is mixture else (logs.exp()[..., None] * answers).sum(1)
        )
        torch.testing.assert_close(tree(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sparse", [False, True])
def test_in_use_the_leaf_at_the_end_of_the_path_answers(sparse):
    torch.manual_seed(0)
    tree, x = execute(crooked().double().eval(), sparse=sparse), torch.randn(50, D).double()
    reached = set()
    for row, answer in zip(x, tree(x), strict=True):
        here, h = tree, row[None]
        while isinstance(here, SoftTree):
            h = here.before(h)
            here = here.right if here.gate.scorer(h) > 0 else here.left
        reached.add(here)
        torch.testing.assert_close(answer, here(h)[0], rtol=1e-12, atol=1e-12)
    assert len(reached) == 4
    assert tree(x[:0]).shape == (0, CLASSES)


def test_a_row_computes_its_own_path_only():
    """The price of depth: routers and transformers of other branches are not evaluated for it."""
    torch.manual_seed(0)
    tree, x = execute(crooked().eval(), sparse=True), torch.randn(40, D)
    cost = CostModel(tree, x[:1])
    solver = D * CLASSES
    price = {"": solver, "right": D + solver, "right.right": D + D + D * D + solver}
    ran = set()
    for row in x:
        with torch.no_grad(), record(tree) as trace, CountMacs() as count:
            tree(row[None])
        deepest = max(trace.keys(), key=len)
        assert deepest == trace.keys()[-1] and len(trace.keys()) == 1 + deepest.count("right")
        assert count.total == cost.spent(trace).item() == D + price[deepest]
        ran.add(count.total)
    assert len(ran) == 3
    assert cost.full == 3 * D + D * D + 4 * solver


def test_the_trace_holds_path_probabilities():
    torch.manual_seed(0)
    tree, x = crooked().double().train(), torch.randn(20, D).double()
    with record(tree) as trace:
        tree(x)
    leaves = [trace[""][0][:, 0], trace["right"][0][:, 0], *trace["right.right"][0].unbind(1)]
    logs = torch.stack([log_p for log_p, _ in paths(tree, x)], 1)
    torch.testing.assert_close(torch.stack(leaves, 1), logs.exp())


def test_a_soft_decision_tree_skips_what_it_does_not_route_through():
    torch.manual_seed(0)
    tree, x = soft_decision_tree(D, CLASSES, 4).eval(), torch.randn(30, D)
    assert len(layers(tree)) == 15
    cost = CostModel(tree, x[:1])
    answers = []
    for sparse in (False, True):
        with torch.no_grad(), record(execute(tree, sparse=sparse)) as trace, CountMacs() as count:
            answers.append(tree(x))
        assert count.total == 30 * D * (4 if sparse else 15)
        assert cost.spent(trace).tolist() == [4 * D] * 30
    torch.testing.assert_close(*answers)
    torch.testing.assert_close(answers[0].exp().sum(1), torch.ones(30))


def test_leaf_cross_entropy_is_that_of_every_leaf_weighted():
    torch.manual_seed(0)
    tree, x, y = crooked(expected).double(), torch.randn(20, D).double(), torch.randint(CLASSES, (20,))
    with record(tree) as trace:
        loss = LeafCrossEntropy()(tree(x), y, trace)
        taught = LeafCrossEntropy()(tree(x), nn.functional.one_hot(y, CLASSES).double(), trace)
    wanted = sum((p.exp() * nn.functional.cross_entropy(a, y, reduction="none")).mean() for p, a in paths(tree, x))
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(taught, wanted)


def test_terms_join_the_objectives():
    torch.manual_seed(0)
    tree, x, y = crooked(), torch.randn(20, D), torch.randint(CLASSES, (20,))
    with record(tree) as trace:
        answer = tree(x)
        both = (CrossEntropy() + RouteBalance(0.3))(answer, y, trace)
        torch.testing.assert_close(both, CrossEntropy()(answer, y, trace) + RouteBalance(0.3)(answer, y, trace))


def test_route_balance_is_the_papers_penalty():
    torch.manual_seed(0)
    tree, x = soft_decision_tree(D, CLASSES, 2).double(), torch.randn(20, D).double()
    with record(tree) as trace:
        penalty = RouteBalance(0.3, decay=0.5)(tree(x), None, trace)
    p, left, right = (n.gate.scorer(x).sigmoid()[:, 0] for n in (tree, tree.left, tree.right))
    shares = [(1, p.mean()), (0.5, ((1 - p) * left).sum() / (1 - p).sum()), (0.5, (p * right).sum() / p.sum())]
    wanted = -0.3 * sum(w * 0.5 * (a.log() + (1 - a).log()) for w, a in shares)
    torch.testing.assert_close(penalty, wanted)
    penalty.backward()
    assert all(n.gate.scorer.weight.grad.abs().sum() > 0 for n in layers(tree).values())
    with record(nn.Linear(1, 1)) as trace, pytest.raises(StructureError, match="with SoftTree layers"):
        RouteBalance()(None, None, trace)


def test_a_node_that_no_row_reaches_is_not_penalised():
    tree = full_tree(2, lambda: Gate(nn.Linear(D, 1), Gumbel()), leaf)
    nn.init.constant_(tree.gate.scorer.bias, 100.0)  # all right
    with record(tree.train()) as trace:
        tree(torch.randn(8, D))
        everyone = RouteBalance(1.0)(None, None, trace)
    assert everyone.isfinite()
    assert everyone < -0.5 * math.log(1e-6) * 1.01 + 0.5 * 0.5 * 20


def test_balance_is_finite_in_bfloat16_when_all_go_one_way():
    tree = full_tree(1, lambda: Gate(nn.Linear(D, 1), Sigmoid()), leaf).bfloat16()
    nn.init.constant_(tree.gate.scorer.bias, 100.0)
    with record(tree.train()) as trace:
        tree(torch.randn(4, D).bfloat16())
    assert RouteBalance()(None, None, trace).isfinite()


@pytest.mark.parametrize(
    "mix, loss", [(mixture, CrossEntropy()), (expected, LeafCrossEntropy())], ids=["mixture", "expected"]
)
def test_a_tree_learns_what_one_linear_map_cannot(mix, loss):
    """Four corners, two classes, crosswise. The loss through soft paths, the accuracy down hard ones."""
    torch.manual_seed(1)
    x = torch.randn(400, D)
    y = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()
    balance = RouteBalance()
    tree = full_tree(2, lambda: Gate(nn.Linear(D, 1), Sigmoid()), lambda: LeafDistribution(2), mix=mix)
    optimizer = torch.optim.Adam(tree.parameters(), 0.1)
    for _ in range(150):
        with record(tree.train()) as trace:
            answer = tree(x)
            total = loss(answer, y, trace) + balance(answer, y, trace)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        right = (execute(tree.eval(), sparse=True)(x).argmax(1) == y).float().mean()
    assert right > 0.9


def test_a_forest_is_the_mean_of_its_trees():
    torch.manual_seed(0)
    forest, x = Forest([crooked(), crooked()]).double(), torch.randn(9, D).double()
    for mode in (True, False):
        forest.train(mode)
        torch.testing.assert_close(forest(x).exp(), sum(t(x).exp() for t in forest.trees) / 2)


def test_a_session_answers_the_same():
    torch.manual_seed(0)
    tree, x = crooked().eval(), torch.randn(9, D)
    with record(tree) as dense:
        y = tree(x)
    session = Session(tree, x, engines="eager")
    with record(session) as sparse:
        torch.testing.assert_close(session(x), y)
    cost = CostModel(tree, x)
    torch.testing.assert_close(cost.spent(sparse), cost.spent(dense))


def test_forced_off_nothing_is_computed_but_the_root():
    tree = execute(crooked().eval(), sparse=True)
    with forced(tree, lambda d: torch.zeros_like(d.keep)), CountMacs() as count:
        assert tree(torch.randn(5, D)).tolist() == [[0.0] * CLASSES] * 5
    assert count.total == 5 * D


WRONG = {
    "no depth": (ConfigError, "^depth", lambda: soft_decision_tree(D, CLASSES, 0)),
    "less than none": (ConfigError, "^depth", lambda: full_tree(-1, nn.Identity, nn.Identity)),
    "frozen": (ConfigError, "temperature .* got 0", lambda: soft_decision_tree(D, CLASSES, 2, temperature=0)),
    "one class": (ConfigError, "classes must be at least 2, got 1", lambda: soft_decision_tree(D, 1, 2)),
    "no features": (ConfigError, "^features", lambda: soft_decision_tree(0, CLASSES, 2)),
    "two scores": (
        StructureError,
        "2 units; expected 1",
        lambda: SoftTree(Gate(nn.Linear(D, 2), Sigmoid(), 2), leaf(), leaf()),
    ),
    "top-k": (StructureError, "TopK", lambda: SoftTree(Gate(nn.Linear(D, 1), TopK(1)), leaf(), leaf())),
    "the best of one": (
        StructureError,
        "RelaxedTopK",
        lambda: SoftTree(Gate(nn.Linear(D, 1), RelaxedTopK()), leaf(), leaf()),
    ),
    "no trees": (StructureError, "no trees", lambda: Forest([])),
    "a bad weight": (ConfigError, "weight must be at least 0, got -1", lambda: RouteBalance(-1)),
    "a bad decay": (ConfigError, "decay must be a share above 0", lambda: RouteBalance(decay=0)),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    error, message, build = WRONG[case]
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("rule", [StraightThrough(), Gumbel(), Sigmoid()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("good", [0, 1])
def test_a_gate_learns_towards_the_better_leaf_whichever_it_took(rule, good):
    answers = [torch.tensor([0.9, 0.1]).log(), torch.tensor([0.1, 0.9]).log()]
    leaves = [Constant(answers[side == good]) for side in (0, 1)]
    tree = SoftTree(Gate(nn.Linear(D, 1), rule), *leaves).train()
    for bias in (-2.0, 2.0):  # mostly left, mostly right
        nn.init.zeros_(tree.gate.scorer.weight)
        nn.init.constant_(tree.gate.scorer.bias, bias)
        tree.zero_grad()
        nn.functional.nll_loss(tree(torch.randn(64, D)), torch.ones(64, dtype=torch.long)).backward()
        slope = float(tree.gate.scorer.bias.grad)
        assert (slope < 0) == (good == 1), slope  # the score of going right rises if right is good


class Constant(nn.Module):
    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer.expand(len(x), -1)
