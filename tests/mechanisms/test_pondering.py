import pytest
import torch
from torch import nn
from torch.nn import functional

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.gates.rules import Threshold
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.mechanisms.pondering import ACT, PonderCost, PonderLoss, PonderNet, log_stopping
from dynanet.session import Session


def told(scores, eps=0.01):
    """An ACT whose halting scores are its input, and whose states are the input times 1, 2, 3, ..."""
    steps = scores.shape[1] + 1

    class Add(nn.Module):
        def __init__(self, k) -> None:
            super().__init__()
            self.k = k

        def forward(self, x):
            return x * (self.k + 1) / max(self.k, 1)

    class Of(nn.Module):
        def __init__(self, k) -> None:
            super().__init__()
            self.k = k

        def forward(self, x):
            return (x[:, self.k : self.k + 1] / (self.k + 1)).logit()

    return ACT([Add(k) for k in range(steps)], [Of(k) for k in range(steps - 1)], eps).double()


# By hand from Graves' eq. 5-9: scores of the first steps; N, R, and the weights of the states.
BY_HAND = [
    ([0.995, 0.5, 0.5], 1, 1.0, [1.0, 0.0, 0.0, 0.0]),
    ([0.3, 0.7, 0.5], 2, 0.7, [0.3, 0.7, 0.0, 0.0]),
    ([0.6, 0.6, 0.6], 2, 0.4, [0.6, 0.4, 0.0, 0.0]),
    ([0.1, 0.2, 0.3], 4, 0.4, [0.1, 0.2, 0.3, 0.4]),
    ([0.1, 0.2, 0.9], 3, 0.7, [0.1, 0.2, 0.7, 0.0]),
]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_act_is_graves_mean(sparse, training):
    scores = torch.tensor([row[0] for row in BY_HAND], dtype=torch.float64)
    weights = torch.tensor([row[3] for row in BY_HAND], dtype=torch.float64)
    model = execute(told(scores).train(training), sparse=sparse)
    states = scores[:, None, :] * torch.arange(1, 5)[None, :, None]
    torch.testing.assert_close(model(scores), (weights[:, :, None] * states).sum(1))


def test_the_ponder_cost_is_steps_and_remainder():
    scores = torch.tensor([row[0] for row in BY_HAND], dtype=torch.float64, requires_grad=True)
    with record(told(scores).train()) as trace:
        next(iter(trace.names))(scores)
    cost = PonderCost()(None, None, trace)
    torch.testing.assert_close(cost, torch.tensor(sum(n + r for _, n, r, _ in BY_HAND) / 5, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(5 * cost, scores)
    before_the_last = torch.tensor([[float(k + 1 < n) for k in range(3)] for _, n, _, _ in BY_HAND])
    torch.testing.assert_close(gradient, -before_the_last.double())  # eq. 10-12: minus one each


def act(steps=4):
    torch.manual_seed(0)
    cells = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(steps)]
    model = ACT(cells, [nn.Linear(6, 1) for _ in range(steps - 1)])
    for k, head in enumerate(model.halting):
        head.weight.data.mul_(6)
        head.bias.data.fill_(k - 1.5)
    return model.eval()


def test_rows_really_leave():
    model, x = act(), torch.randn(20, 6)
    ran = []
    for k, cell in enumerate(model.cells):
        cell.register_forward_hook(lambda m, args, out, k=k: ran.append((k, len(out))))
    with torch.no_grad(), record(execute(model, sparse=True)) as trace:
        model(x)
    steps = 1 + torch.cat(trace[""], 1).sum(1)
    assert len(steps.unique()) >= 3
    assert ran == [(k, int((steps > k).sum())) for k in range(4)]


def test_costs_press_on_halting():
    """A step along the gradient of the ponder cost, and rows stop earlier or remainders shrink."""
    model, x = act().train(), torch.randn(64, 6)
    costs = []
    for _ in range(12):
        with record(model) as trace:
            model(x)
        cost = PonderCost()(None, None, trace)
        costs.append(cost.item())
        model.zero_grad()
        cost.backward()
        with torch.no_grad():
            for p in model.halting.parameters():
                p -= 0.7 * p.grad
    assert costs[-1] < costs[0] - 0.5


def test_a_limit_takes_the_remainder_where_it_falls():
    model, x = act(), torch.randn(20, 6)
    cut = ACT(list(model.cells)[:2], list(model.halting)[:1]).eval()
    model.limit = 2
    with torch.no_grad():
        assert not torch.allclose(cut(x), act()(x))
    torch.testing.assert_close(model(x), cut(x))


def ponder(steps=4, at=0.5):
    torch.manual_seed(0)
    cells = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(steps)]
    model = PonderNet(cells, [nn.Linear(6, 3) for _ in cells], [nn.Linear(6, 1) for _ in range(steps - 1)], at)
    for head in model.halting:
        head.weight.data.mul_(6)
    return model.double()


def by_the_paper(model, x):
    """p_n, and every step's logits."""
    left, p, answers = torch.ones(len(x), dtype=x.dtype), [], []
    for k in range(model.steps):
        x = model.cells[k](x)
        answers.append(model.exits[k](x))
        stops = model.halting[k](x)[:, 0].sigmoid() if k + 1 < model.steps else torch.ones_like(left)
        p.append(left * stops)
        left = left * (1 - stops)
    return torch.stack(p, 1), answers


@pytest.mark.parametrize("training", [False, True])
def test_pondernets_loss_is_the_papers(training):
    model, x, y = ponder().train(training), torch.randn(10, 6).double(), torch.randint(3, (10,))
    p, answers = by_the_paper(model, x)
    prior = torch.tensor([0.3 * 0.7**n for n in range(4)], dtype=torch.float64)
    prior = prior / prior.sum()
    expected = sum((p[:, n] * functional.cross_entropy(a, y, reduction="none")).mean() for n, a in enumerate(answers))
    expected = expected + 0.2 * (p * (p / prior).log()).sum(1).mean()
    with record(model) as trace:
        answer = model(x)
    torch.testing.assert_close(PonderLoss(0.3, 0.2)(answer, y, trace), expected)
    torch.testing.assert_close(log_stopping(trace, model, "").exp(), p)
    if training:
        torch.testing.assert_close(answer, sum(p[:, n : n + 1] * a for n, a in enumerate(answers)))


def test_in_training_the_cost_is_the_expected_one():
    model, x = ponder(), torch.randn(10, 6).double()
    cost = CostModel(model, x)
    p, _ = by_the_paper(model, x)
    with record(model) as trace, forced(model, lambda d: torch.ones_like(d.keep)):
        model(x)
    steps = cost.steps(trace)
    with record(model.train()) as trace:
        model(x)
    torch.testing.assert_close(cost.spent(trace), (p * steps).sum(1))


def test_it_stops_where_stopping_has_become_likely():
    model, x = ponder(at=0.4).eval(), torch.randn(40, 6).double()
    p, answers = by_the_paper(model, x)
    last = (p.cumsum(1) < 0.4).sum(1).clamp(max=3)
    assert len(last.unique()) >= 3
    expected = torch.stack(answers, 1)[torch.arange(40), last]
    for sparse in (False, True):
        torch.testing.assert_close(execute(model, sparse=sparse)(x), expected)


def test_hazards_that_vanish_or_explode_have_finite_gradients():
    model, x, y = ponder().float().train(), torch.randn(8, 6), torch.randint(3, (8,))
    for bias in (-200.0, 200.0):
        for head in model.halting:
            nn.init.constant_(head.bias, bias)
        with record(model) as trace:
            answer = model(x)
        loss = PonderLoss(0.2)(answer, y, trace)
        loss.backward()
        assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_one_step_only():
    one, x, y = PonderNet([nn.Linear(6, 6)], [nn.Linear(6, 3)], []).train(), torch.randn(4, 6), torch.randint(3, (4,))
    with record(one) as trace:
        answer = one(x)
    torch.testing.assert_close(PonderLoss(0.5)(answer, y, trace), functional.cross_entropy(answer, y))


@pytest.mark.parametrize("make", [act, ponder])
@pytest.mark.parametrize("engines", ["eager", "onnxruntime"])
def test_in_a_session(make, engines):
    model, x = make(3).float().eval(), torch.randn(20, 6)
    session = Session(model, x, engines=engines, batches=(8,))
    with record(session) as trace:
        answer = session(x)
    with torch.no_grad(), record(execute(model, sparse=True)) as expected:
        torch.testing.assert_close(answer, model(x), rtol=1e-4, atol=1e-5)
    cost = CostModel(model, x)
    torch.testing.assert_close(cost.spent(trace), cost.spent(expected))
    torch.testing.assert_close(session(x[:1]), answer[:1], rtol=1e-4, atol=1e-5)


def test_what_means_nothing_is_refused():
    cell, head = nn.Linear(6, 6), nn.Linear(6, 1)
    with pytest.raises(StructureError, match="2 cells and 2 halting"):
        ACT([cell, cell], [head, head])
    with pytest.raises(StructureError, match="at least one cell"):
        PonderNet([], [], [])
    with pytest.raises(StructureError, match="1 exits"):
        PonderNet([cell, cell], [cell], [head])
    for eps in (0, 1):
        with pytest.raises(ConfigError, match="eps"):
            ACT([cell], [], eps)
    for model in (ACT([cell, cell], [cell]), PonderNet([cell, cell], [cell, cell], [cell])):
        with pytest.raises(StructureError, match=r"scores of shape \(2, 6\) for 2 rows"):
            model(torch.randn(2, 6))
    with pytest.raises(ConfigError, match="got at = 1"):
        PonderNet([cell], [cell], [], at=1)
    for arguments in ((0, 0.1), (1, 0.1), (0.5, -1)):
        with pytest.raises(ConfigError, match="prior"):
            PonderLoss(*arguments)


def test_losses_say_what_is_missing():
    x, y = torch.randn(20, 6), torch.randint(3, (20,))
    with record(execute(act(), sparse=True)) as trace:
        answer = next(iter(trace.names))(x)
    with pytest.raises(StructureError, match="use train mode"):
        PonderCost()(answer, y, trace)
    with pytest.raises(StructureError, match="model with PonderNet layers"):
        PonderLoss(0.5)(answer, y, trace)
    with record(LayerSkip(nn.Linear(6, 6), Gate(nn.Linear(6, 1), Threshold()))) as trace:
        next(iter(trace.names))(x)
    with pytest.raises(StructureError, match="model with ACT layers"):
        PonderCost()(answer, y, trace)


class Turned(nn.Module):
    """A step that half the rows need: it turns the second feature round where the first, a flag, is up."""

    def forward(self, x):
        return torch.cat([x[:, :1], torch.where(x[:, :1] > 0, -x[:, 1:2], x[:, 1:2]), x[:, 2:]], 1)


class SignOfSecond(nn.Module):
    def forward(self, x):
        return torch.stack([-4 * x[:, 1], 4 * x[:, 1]], 1)


def flagged(rows, generator):
    x = torch.randn(rows, 4, generator=generator)
    return x, (Turned()(x)[:, 1] > 0).long(), x[:, 0] > 0


def halting_only(kind):
    torch.manual_seed(0)
    cells, halting = [nn.Identity(), Turned()], [nn.Linear(4, 1)]
    if kind == "ACT":
        model = nn.Sequential(ACT(cells, halting, eps=0.4), SignOfSecond())
        return model, lambda a, y, trace: functional.cross_entropy(a, y) + 0.3 * PonderCost()(a, y, trace)
    return nn.Sequential(PonderNet(cells, [SignOfSecond()] * 2, halting)), PonderLoss(0.8, 1.0)


@pytest.mark.parametrize("kind", ["ACT", "PonderNet"])
def test_learnt_halting_beats_halting_at_random_with_the_same_rate(kind):
    """Given steps, of which half the rows need the second, and nothing says which but the loss."""
    generator = torch.Generator().manual_seed(5)
    model, objective = halting_only(kind)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(150):
        x, y, _ = flagged(128, generator)
        with record(model.train()) as trace:
            answer = model(x)
        optimizer.zero_grad()
        objective(answer, y, trace).backward()
        optimizer.step()
    x, y, hard = flagged(2000, generator)
    with torch.no_grad(), record(execute(model.eval(), sparse=True)) as trace:
        answer = model(x)
    should_continue = trace["0"][0][:, 0]
    shuffled = should_continue[torch.randperm(len(x), generator=generator)]
    with torch.no_grad(), forced(model, lambda d: shuffled[:, None]):
        random = model(x)
    learnt, by_chance = ((a.argmax(1) == y).double().mean().item() for a in (answer, random))
    assert should_continue[hard].mean() > should_continue[~hard].mean() + 0.3
    assert learnt > by_chance + 0.05
