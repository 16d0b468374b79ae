import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from dynanet import train
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.gates.recurrent import RecurrentGate
from dynanet.gates.rules import Bernoulli, Sigmoid, Threshold
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip, RecurrentSkip
from dynanet.mechanisms.policy_skip import PolicySkip
from dynanet.train.reinforce import (
    CostReward,
    DropReward,
    Reinforce,
    Reward,
    SkipReward,
    deployed_reward,
    sample_gates,
    sampled,
    surrogate,
)


def net(rule=Bernoulli):
    torch.manual_seed(0)
    skips = [LayerSkip(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), Gate(nn.Linear(4, 1), rule())) for _ in range(2)]
    return nn.Sequential(*skips, nn.Linear(4, 3)).double().train()


def batch(rows=6):
    torch.manual_seed(1)
    return torch.randn(rows, 4).double(), torch.randint(3, (rows,))


def passed(model, x):
    with record(model) as trace:
        answer = model(x)
    return answer, trace


def keeping(pattern):
    """Forces the k-th layer's keep to pattern[k], for every row."""
    wanted = iter(pattern)
    return lambda d: torch.full_like(d.keep, float(next(wanted)))


def test_the_gradient_is_that_of_the_expected_reward():
    """All four paths through two gates, weighted with their probabilities, against the derivative of the mean."""
    model, (x, y), reward = net(), batch(1), SkipReward(0.7)
    expected, estimate = 0.0, 0.0
    parameters = [p for layer in model[:2] for p in layer.gate.parameters()]
    for pattern in itertools.product((0, 1), repeat=2):
        with forced(model, keeping(pattern)):
            answer, trace = passed(model, x)
        log_p = sum(Bernoulli.log_prob(call.decision.score, call.decision.keep).sum() for call in sampled(trace))
        expected = expected + log_p.exp() * reward(answer, y, trace)[0, 0].detach()
        loss = surrogate(trace, reward(answer, y, trace))
        gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
        estimate = estimate + log_p.exp().detach() * torch.cat([g.flatten() for g in gradient])
    # The first gate's decision moves the second's score, so the derivative is of scores given the path.
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(-expected, parameters)])
    torch.testing.assert_close(estimate, exact)


def test_the_other_samples_are_the_baseline():
    model, (x, y) = net(), batch()

    class Fixed(Reward):
        def __call__(self, answer, y, trace):
            return torch.arange(6.0).double()

    answer, trace = passed(model, x)
    r = torch.arange(6.0).double()
    others = torch.stack([torch.cat([r[:i], r[i + 1 :]]).mean() for i in range(6)])
    torch.testing.assert_close(Reinforce(Fixed())(answer, y, trace), surrogate(trace, r - others))


def test_rewards_are_the_papers():
    model, (x, y) = net(), batch()
    answer, trace = passed(model, x)
    first, second = (keep[:, 0] for keep in (trace["0"][0], trace["1"][0]))
    ce = functional.cross_entropy(answer, y, reduction="none").detach()
    to_come = torch.stack([((1 - first) + (1 - second)) / 2, (1 - second) / 2], 1)
    torch.testing.assert_close(SkipReward(0.3)(answer, y, trace), 0.3 * to_come - ce[:, None])
    right = (answer.argmax(1) == y).double()
    dropped = right * (1 - ((first + second) / 2) ** 2) - 5 * (1 - right)
    torch.testing.assert_close(DropReward(5)(answer, y, trace), dropped)
    cost = CostModel(model, x)
    macs = cost.always + 16 * (first + second)
    torch.testing.assert_close(CostReward(2.0, cost)(answer, y, trace), -ce - 2 * macs / cost.full)
    with pytest.raises(ConfigError, match="at least 0"):
        DropReward(-1)


def test_entropy_pulls_towards_a_coin():
    model, (x, y) = net(), batch()
    nn.init.constant_(model[0].gate.scorer.bias, 3.0)
    torch.manual_seed(3)
    answer, trace = passed(model, x)
    loss = Reinforce(SkipReward(0.0), entropy=1.0)(answer, y, trace) - Reinforce(SkipReward(0.0))(answer, y, trace)
    p = torch.cat([call.decision.score for call in trace.calls], 1).sigmoid()
    torch.testing.assert_close(loss, (p * p.log() + (1 - p) * (1 - p).log()).mean())
    assert torch.autograd.grad(loss, model[0].gate.scorer.bias)[0] > 0


def test_only_sampled_decisions_count():
    """Neither a threshold's, nor an exit's, nor those of a layer around the one that samples."""
    torch.manual_seed(0)
    inner = LayerSkip(nn.Linear(4, 4), Gate(nn.Linear(4, 1), Bernoulli()))
    outer = LayerSkip(nn.Sequential(inner), Gate(nn.Linear(4, 1), Threshold()))
    model = EarlyExit([outer, nn.Linear(4, 4)], [nn.Linear(4, 3), nn.Linear(4, 3)]).train()
    _, trace = passed(model, torch.randn(6, 4))
    assert len(trace.calls) == 3
    assert [call.name for call in sampled(trace)] == ["stages.0.block.0"]


def test_tokens_belong_to_their_samples():
    torch.manual_seed(0)
    inner = LayerSkip(nn.Linear(4, 4), Gate(nn.Linear(4, 1), Bernoulli()))
    model = LayerSkip(inner, Gate(nn.Linear(4, 1), Bernoulli())).train()
    _, trace = passed(model, torch.randn(3, 5, 4))
    log_p = [Bernoulli.log_prob(call.decision.score, call.decision.keep).reshape(3, 5).sum(1) for call in trace.calls]
    advantage = torch.randn(3)
    torch.testing.assert_close(surrogate(trace, advantage), -(advantage * (log_p[0] + log_p[1])).mean())


def test_validation_costs_nothing():
    model, (x, y) = net().eval(), batch()
    answer, trace = passed(model, x)
    loss = Reinforce(SkipReward(0.1))(answer, y, trace)
    assert loss == 0 and not loss.requires_grad


def test_deployed_reward_leaves_the_model_as_it_was():
    model, (x, y) = net(), batch()
    state = torch.get_rng_state()
    reward = deployed_reward(model, x, y, SkipReward(0.3))
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in model.modules())
    answer, trace = passed(model.eval(), x)
    torch.testing.assert_close(reward, SkipReward(0.3)(answer, y, trace))
    with pytest.raises(StructureError, match="no gate of this model samples"):
        deployed_reward(net(Sigmoid), x, y, SkipReward(0.3))


def test_what_cannot_be_reinforced_is_refused():
    (x, y), model = batch(), net(Threshold)
    with pytest.raises(StructureError, match="nothing was sampled.*sample_gates"):
        Reinforce(SkipReward(0.1))(*_answer_y_trace(model, x, y))
    with pytest.raises(StructureError, match="no gate of this model has a differentiable rule"):
        sample_gates(model)
    assert isinstance(sample_gates(net(Sigmoid))[0].gate.rule, Bernoulli)


def _answer_y_trace(model, x, y):
    answer, trace = passed(model, x)
    return answer, y, trace


def test_repr_tells_the_settings():
    objective = train.CrossEntropy() + Reinforce(SkipReward(0.1), entropy=0.01)
    assert repr(objective) == (
        "1 * CrossEntropy(label_smoothing=0.0) + 1 * Reinforce(reward=SkipReward(alpha=0.1), entropy=0.01)"
    )


# Training: gates that learn where the work is


class Turned(nn.Module):
    """A block that half the rows need: it turns the second feature round where the first, a flag, is up."""

    def forward(self, x):
        wanted = torch.where(x[:, 0] > 0, -x[:, 1], x[:, 1])
        return torch.cat([x[:, :1], wanted[:, None], x[:, 2:]], 1)


class SignOfSecond(nn.Module):
    """Right for all rows after the block, and without it for those whose flag is down."""

    def forward(self, x):
        return torch.stack([-4 * x[:, 1], 4 * x[:, 1]], 1)


def flagged(rows, generator):
    x = torch.randn(rows, 4, generator=generator)
    return x, (Turned()(x)[:, 1] > 0).long(), x[:, 0] > 0


def gated(kind):
    torch.manual_seed(0)
    if kind == "policy":
        skip = PolicySkip(Gate(nn.Linear(4, 1), Bernoulli()), [Turned()])
    elif kind == "recurrent":
        skip = RecurrentSkip([Turned()], RecurrentGate([4], Bernoulli(), bias=0.0))
    else:
        skip = LayerSkip(Turned(), Gate(nn.Linear(4, 1), Bernoulli()))
    return nn.Sequential(skip, SignOfSecond())


@pytest.mark.parametrize("reward", [SkipReward(1.0), DropReward(1.0)], ids=repr)
@pytest.mark.parametrize("kind", ["gate", "recurrent", "policy"])
def test_a_reinforced_gate_beats_a_random_one_of_its_rate(kind, reward):
    """A given network, of which half the rows need the block and nothing says which but the reward."""
    generator = torch.Generator().manual_seed(7)
    model = gated(kind).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    objective = Reinforce(reward, entropy=0.02)
    for _ in range(150):
        x, y, _ = flagged(128, generator)
        answer, trace = passed(model, x)
        optimizer.zero_grad()
        objective(answer, y, trace).backward()
        optimizer.step()
    x, y, hard = flagged(2000, generator)
    with torch.no_grad():
        answer, trace = passed(execute(model.eval(), sparse=True), x)
        keep = trace["0"][0][:, 0]
        shuffled = keep[torch.randperm(len(x), generator=generator)]
        with forced(model, lambda d: shuffled[:, None]):
            random = model(x)
    learnt, by_chance = ((a.argmax(1) == y).double().mean().item() for a in (answer, random))
    assert keep[hard].mean() > keep[~hard].mean() + 0.3  # it found where the work is
    assert learnt > by_chance + 0.05
