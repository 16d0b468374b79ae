import copy

import pytest
import torch
from torch import nn

from dynanet.calibrate.frontier import calibrate, select_exits, with_exits
from dynanet.calibrate.operating_point import choose
from dynanet.calibrate.table import tabulate
from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.errors import BudgetError, ConfigError, DataError, StructureError
from dynanet.core.macs import CountMacs
from dynanet.gates.confidence import Entropy, LearnedGate, MaxProbability, Patience, PerExit
from dynanet.mechanisms.early_exit import EarlyExit, JointGates
from dynanet.session import Session
from dynanet.train.objectives import MultiExit

D, CLASSES, EXITS = 6, 4, 5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(confidence=None, hidden=9):
    """Exits of two layers, so that a head has a price worth saving; weights large enough for exits to disagree."""
    stages = [nn.Sequential(nn.Linear(D, 30), nn.Tanh(), nn.Linear(30, D), nn.Tanh()) for _ in range(EXITS)]
    exits = [nn.Sequential(nn.Linear(D, hidden + k), nn.Linear(hidden + k, CLASSES)) for k in range(EXITS)]
    model = EarlyExit(stages, exits, confidence).eval()
    with torch.no_grad():
        for stage in model.stages:
            for linear in (stage[0], stage[2]):
                nn.init.normal_(linear.weight, std=1.5 * linear.in_features**-0.5)
                nn.init.zeros_(linear.bias)
        for leave in model.exits:
            nn.init.zeros_(leave[0].bias)
            nn.init.zeros_(leave[1].bias)
    return model


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_leaves_where_the_paper_says(patience):
    """PABEE's algorithm written down once more: a counter per sample, set back where an exit disagrees."""
    model, x = network(Patience()), torch.randn(200, D)
    model.thresholds.fill_(patience)
    answers = torch.stack([a.argmax(1) for a in model.answers(x)], 1).tolist()
    expected = []
    for row in answers:
        counter, exit_ = 0, EXITS - 1
        for k in range(1, EXITS):
            counter = counter + 1 if row[k] == row[k - 1] else 0
            if counter == patience:
                exit_ = k
                break
        expected.append(exit_)
    for sparse in (False, True):
        with torch.no_grad(), record(execute(model, sparse=sparse)) as trace:
            model(x)
        assert sum(k[:, 0] for k in trace[""]).tolist() == expected
    assert len(set(expected)) == EXITS - patience, "a test of one exit would show little"


def called(model, x):
    """Which heads ran."""
    ran = []
    handles = [e.register_forward_hook(lambda *_, k=k: ran.append(k)) for k, e in enumerate(model.exits)]
    with torch.no_grad(), forced(model, everything):
        model(x)
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("sparse", [False, True])
def test_an_exit_that_is_off_is_not_computed_and_the_others_answer_as_before(sparse):
    model, x = execute(network(), sparse=sparse), torch.randn(30, D)
    before, full = model.answers(x), CostModel(model, x).full
    prices = model.exit_macs(x)
    assert prices == [(D + CLASSES) * (9 + k) for k in range(EXITS)]
    model.active = (1, 4)
    assert called(model, x) == [1, 4] and model.steps == 2
    for ours, theirs in zip(model.answers(x), (before[1], before[4]), strict=True):
        assert torch.equal(ours, theirs)
    assert full - CostModel(model, x).full == prices[0] + prices[2] + prices[3]
    assert model.exit_macs(x) == prices, "as if all were on"


def test_switching_on_again_and_what_is_no_choice_of_exits():
    model = network()
    model.thresholds.fill_(0.5)
    model.active = (0, 4)
    assert model.thresholds.tolist() == [0.5, torch.inf, torch.inf, torch.inf]
    assert model.exit_of(0) == 0 and model.exit_of(1) == 4 and model.active == (0, 4)
    model.active = range(5)
    assert model.steps == 5 and [model.exit_of(k) for k in range(4)] == [0, 1, 2, 3]
    for wrong in ((), (0, 1), (4, 0), (1, 1, 4), (-1, 4), (2, 5)):
        with pytest.raises(StructureError, match="the last included"):
            model.active = wrong
    assert model.active == (0, 1, 2, 3, 4), "a refused choice changes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_alone_goes_on_where_it_would_in_a_batch(dtype):
    model = network().to(dtype)
    model.active = (0, 2, 4)
    model.thresholds.copy_(torch.tensor([0.3, torch.inf, -0.7, torch.inf]))
    for k in (0, 1):
        threshold = model.thresholds[model.active[k]]
        near = [torch.nextafter(threshold, torch.full_like(threshold, to)) for to in (-torch.inf, torch.inf)]
        scores = torch.stack([threshold, *near, -threshold, *torch.tensor([torch.nan, torch.inf]).to(dtype)])
        expected = model.should_continue(k, scores[:, None])[:, 0].bool().tolist()
        assert [model.should_continue_one(k, score.expand(3, 1)) for score in scores] == expected


def test_a_row_alone_goes_on_by_a_rule_of_ones_own():
    class Never(EarlyExit):
        def should_continue(self, k, score):
            return torch.zeros_like(score)

    base = network()
    base.thresholds.fill_(torch.inf)
    model = Never(base.stages, base.exits).eval()
    x = torch.randn(1, D)
    torch.testing.assert_close(Session(model, x, engines="eager")(x), base.answers(x)[0])


def test_a_state_dict_loads_whichever_exits_are_on():
    model, x = network(), torch.randn(40, D)
    model.active = (2, 4)
    model.thresholds[2] = 0.0
    whole = network()
    whole.load_state_dict(model.state_dict())
    assert torch.equal(whole(x), model(x)), "the others' thresholds are infinite"
    whole.active = model.active
    assert torch.equal(whole(x), model(x))


@pytest.mark.parametrize("engines", ["eager", "onnxruntime"])
def test_a_session_skips_the_exit_too(engines):
    model, x = network(), torch.randn(33, D)
    model.active = (0, 3, 4)
    with torch.no_grad():
        first, second, _ = (model.confidence(a).quantile(0.51) for a in model.answers(x))
        model.thresholds[[0, 3]] = torch.stack([first, second])
    cost, session = CostModel(model, x), Session(model, x, engines=engines, threads=1, batches=(8,))
    with torch.no_grad(), record(session) as trace:
        answers = session(x)
    torch.testing.assert_close(answers, model(x), rtol=1e-4, atol=1e-5)
    assert 0 < trace[""][0].mean() < 1
    if engines == "eager":
        with CountMacs() as count:
            session(x)
        assert count.total == cost.spent(trace).sum().item()


def test_exits_are_chosen_and_the_calibrated_model_does_what_the_table_said():
    model, x = network(hidden=30), torch.randn(400, D)
    with torch.no_grad():
        model.exits[1][1].weight.zero_()  # knows nothing, and costs as much as the others
    y = model.answers(x)[-1].argmax(1)
    cost, prices = CostModel(model, x), model.exit_macs(x)
    table = tabulate(model, [(x, y)], cost)
    budget = Budget(macs=0.6 * table.macs[-1])
    exits = select_exits(table, prices, budget)
    assert 1 not in exits and exits[-1] == EXITS - 1
    small = copy.deepcopy(model)
    small.active = exits
    frontier = calibrate(small, [(x, y)], CostModel(small, x))
    expected = with_exits(table, exits, prices)
    for name in ("scores", "answers", "macs", "worst"):
        assert (getattr(frontier.table, name) == getattr(expected, name)).all(), name
    choice = frontier.choose(budget)
    assert choice.accuracy >= choose(table, budget).accuracy
    done = frontier.at(budget)
    for sparse in (False, True):
        with torch.no_grad(), record(execute(done, sparse=sparse)) as trace:
            answers = done(x)
        assert CostModel(done, x).spent(trace).mean().item() == pytest.approx(choice.macs)
        assert (answers.argmax(1) == y).double().mean().item() == choice.accuracy
    off = [k for k in range(EXITS - 1) if k not in exits]
    assert (done.thresholds[off] == torch.inf).all()


def test_exits_are_not_chosen_for_what_cannot_be_known():
    model, x = network(), torch.randn(50, D)
    table = tabulate(model, [(x, torch.zeros(50).long())], CostModel(model, x))
    prices = model.exit_macs(x)
    for budget in (Budget(risk=0.1), Budget(ms=1.0), Budget(macs=table.macs[1], cap_macs=table.macs[2])):
        with pytest.raises(BudgetError, match="mean cost in MACs"):
            select_exits(table, prices, budget)
    for wrong in (prices[:-1], [1e9] * EXITS, [-1.0] * EXITS):
        with pytest.raises(DataError, match="exit_macs"):
            with_exits(table, (0, 4), wrong)
    with pytest.raises(DataError, match="the last one included"):
        with_exits(table, (0, 1), prices)


def test_a_confidence_that_lacks_an_exit_is_refused_at_construction():
    with pytest.raises(StructureError, match="no confidence for exit .*, only 3;"):
        network(PerExit([MaxProbability()] * 3))
    assert network(PerExit([Entropy()] * 4)).steps == EXITS


def joint(weight=0.1):
    model = network(PerExit([LearnedGate() for _ in range(EXITS - 1)])).train()
    return model, JointGates([1, 2, 3, 4, 5], weight)


def test_joint_training_reaches_gates_and_classifiers_each_by_its_own_loss():
    model, term = joint()
    x, y = torch.randn(64, D), torch.randint(CLASSES, (64,))
    with record(model) as trace:
        loss = term(model(x), y, trace)
    loss.backward()
    assert all(g.linear.weight.grad.abs().sum() > 0 for g in model.confidence.exits)
    assert all(e[1].weight.grad.abs().sum() > 0 for e in model.exits)
    with record(model) as trace:
        (MultiExit()(model(x), y, trace) + term(None, y, trace)).backward()
    assert "weight=0.1" in repr(term)


@pytest.mark.parametrize(("weight", "leaves"), [(0.0, False), (50.0, True)])
def test_joint_gates_learn_to_leave_where_cost_says_so(weight, leaves):
    """With a price beyond all losses the first exit is best; without one, an exit that knows nothing never is."""
    model, term = joint(weight)
    nn.init.zeros_(model.exits[0][1].weight)
    model.exits[0].requires_grad_(False)
    x = torch.randn(256, D)
    y = (x[:, 0] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        with record(model) as trace:
            loss = term(model(x), y, trace)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad(), record(model.eval()) as trace:
        model(x)
    first = trace.calls[0].decision.score
    assert ((first > 0) == leaves).all()


def test_joint_training_refuses_what_it_cannot_read():
    model, term = joint()
    x, y = torch.randn(8, D), torch.zeros(8).long()
    with record(model) as trace:
        model(x)
    with pytest.raises(StructureError, match="one cost per exit"):
        JointGates([1, 2], 0.1)(None, y, trace)
    with pytest.raises(StructureError, match="name one"):
        JointGates([1, 2], 0.1, halt="head")(None, y, trace)
    model.eval().thresholds.fill_(-torch.inf)
    with torch.no_grad(), record(execute(model, sparse=True)) as trace:
        model(x)
    with pytest.raises(StructureError, match="train mode"):
        term(None, y, trace)
    for macs, weight in (([2, 1], 0.1), ([], 0.1), ([0, 0], 0.1), ([1, 2], -1), ([1, 2], float("nan"))):
        with pytest.raises(ConfigError):
            JointGates(macs, weight)
