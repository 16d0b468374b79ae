import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from dynanet import train
from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.errors import BudgetError, ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.gates.rules import Sigmoid
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.mechanisms.pixel_cascade import PixelCascadeLoss
from tests.train.train_toys import data, toy


def passed(model, x):
    with record(model) as trace:
        answer = model(x)
    return answer, trace


def batch():
    x, y = zip(*data(12), strict=True)
    return torch.stack(x).double(), torch.stack(y)


def chain(exits=3):
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(exits)]
    return EarlyExit(stages, [nn.Linear(8, 3) for _ in range(exits)]).double().train()


def test_multi_exit_is_the_weighted_sum_over_exits():
    model, (x, y) = chain(), batch()
    answer, trace = passed(model, x)
    parts = [functional.cross_entropy(each, y) for each in model.answers(x)]
    torch.testing.assert_close(train.MultiExit()(answer, y, trace), sum(parts))
    weighted = train.MultiExit([1.0, 0.0, 0.5])(answer, y, trace)
    torch.testing.assert_close(weighted, parts[0] + 0.5 * parts[2])


def test_the_last_exit_teaches_and_does_not_learn_from_it():
    model, (x, y) = chain(), batch()
    answer, trace = passed(model, x)
    taught = train.MultiExit(distill=0.7, temperature=2.0)(answer, y, trace) - train.MultiExit()(answer, y, trace)
    first, second, last = (each.div(2.0).log_softmax(1) for each in model.answers(x))
    kl = sum((last.exp() * (last - each)).sum(1).mean() for each in (first, second))
    torch.testing.assert_close(taught, 0.7 * 4.0 * kl)
    taught.backward()
    assert model.exits[0].weight.grad.abs().sum() > 0
    assert model.exits[2].weight.grad.abs().max() < 1e-12


def test_objectives_add_and_scale():
    model, (x, y) = chain(), batch()
    answer, trace = passed(model, x)
    one, other = train.CrossEntropy(), train.MultiExit(label_smoothing=0.1)
    both = 2.0 * (one + 0.5 * other) + one
    expected = 3.0 * one(answer, y, trace) + other(answer, y, trace)
    torch.testing.assert_close(both(answer, y, trace), expected)
    assert repr(both) == f"2 * {one!r} + 1 * {other!r} + 1 * {one!r}"


def test_within_is_the_squared_relative_excess_and_presses_on_the_gate():
    torch.manual_seed(0)
    skip = LayerSkip(nn.Linear(8, 8), Gate(nn.Linear(8, 1), Sigmoid())).double().train()
    x, y = batch()
    cost = CostModel(skip, x)
    skip.train()
    answer, trace = passed(skip, x)
    spent = cost.spent(trace).mean()
    budget = Budget(macs=cost.always + 1)
    loss = train.BudgetPenalty(budget, cost)(answer, y, trace)
    torch.testing.assert_close(loss, ((spent - budget.macs) / cost.full) ** 2)
    loss.backward()
    assert skip.gate.scorer.bias.grad > 0  # less bias: lower scores, fewer rows kept
    assert train.BudgetPenalty(Budget(macs=cost.worst), cost)(answer, y, trace) == 0


def test_within_refuses_what_it_cannot_keep():
    cost = CostModel(toy(), torch.zeros(1, 8))
    with pytest.raises(BudgetError, match="a budget in MACs, got Budget.ms=1.0"):
        train.BudgetPenalty(Budget(ms=1.0), cost)
    with pytest.raises(BudgetError, match="below the .* that always run"):
        train.BudgetPenalty(Budget(macs=0.5 * cost.always), cost)


def test_target_rate_sums_over_layers():
    model, (x, y) = toy().double().train(), batch()
    answer, trace = passed(model, x)
    rate = trace["stages.1"][0].mean()
    torch.testing.assert_close(train.TargetRate({"stages.1": 0.3})(answer, y, trace), (rate - 0.3) ** 2)
    both = train.TargetRate(0.3)(answer, y, trace)
    torch.testing.assert_close(both, (rate - 0.3) ** 2 + (1 - 0.3) ** 2)
    with pytest.raises(StructureError, match="no decision of .'elsewhere'"):
        train.TargetRate({"elsewhere": 0.5})(answer, y, trace)
    with pytest.raises(ConfigError, match="at most 1, got 2"):
        train.TargetRate(2)
    with pytest.raises(ConfigError, match="above 0 and at most 1, got 0"):
        train.TargetRate(0.0)


def test_multi_exit_says_what_is_missing():
    x, y = batch()
    answer, trace = passed(nn.Linear(8, 3).double(), x)
    with pytest.raises(StructureError, match="expected the exits of one Halt"):
        train.MultiExit()(answer, y, trace)
    answer, trace = passed(chain(), x)
    with pytest.raises(ConfigError, match="2 weights for 3 exits"):
        train.MultiExit([1, 1])(answer, y, trace)
    halved = execute(chain().eval(), sparse=True)
    with forced(halved, lambda d: (torch.arange(len(d.keep)) % 2)[:, None]):
        answer, trace = passed(halved, x)
    with pytest.raises(StructureError, match="only some rows reached"):
        train.MultiExit()(answer, y, trace)


@pytest.mark.parametrize("loss", [train.MultiExit, lambda w: PixelCascadeLoss(weights=w)], ids=["exits", "pixels"])
@pytest.mark.parametrize("weights", [[1, -0.5], [-1, -1], [0, 0], [], [1, math.nan], [1, math.inf], [-math.inf, 1]])
def test_exit_weights_that_mean_nothing(loss, weights):
    with pytest.raises(ConfigError, match="exit weights must be finite, at least 0 and not all 0"):
        loss(weights)
    loss([0, 1e-3])


@pytest.mark.parametrize(
    "options",
    [{"distill": -1}, {"distill": math.inf}, {"distill": math.nan}, {"temperature": 0}, {"temperature": math.inf}],
)
def test_distillation_that_means_nothing(options):
    with pytest.raises(ConfigError, match="must be finite"):
        train.MultiExit(**options)


# Gradient equilibrium


class Fork(torch.autograd.Function):
    """The paper's rescaling, for one tensor: identity forward, a factor backward."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def papers_gradients(model, x, y):
    """Each fork rescaled by hand, as the paper has it."""
    features, loss, exits = x, 0.0, model.steps
    for i, (stage, head) in enumerate(zip(model.stages, model.exits, strict=True), 1):
        features = stage(features)
        loss = loss + functional.cross_entropy(head(Fork.apply(features, 1 / (exits - i + 1))), y)
        features = Fork.apply(features, (exits - i) / (exits - i + 1))
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("exits", [1, 2, 5])
def test_equilibrium_is_the_papers_rescaling_on_a_chain(exits):
    model, (x, y) = chain(exits), batch()
    expected = papers_gradients(model, x, y)
    model.zero_grad()
    answer, trace = passed(model, x)
    counts = train.exits_reached(trace)
    train.MultiExit()(answer, y, trace).backward()
    train.rescale_gradients(counts)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_exits_reached_counts_nested_and_frozen_weights():
    model = toy().train()
    model.exits[0].weight.requires_grad_(False)
    with forced(model, everything):
        _, trace = passed(model, torch.zeros(4, 8))
    counts = {name: train.exits_reached(trace).get(p, 0) for name, p in model.named_parameters()}
    assert counts["stages.0.0.weight"] == 2 and counts["exits.1.weight"] == 1 and counts["stages.1.block.0.weight"] == 1
    assert counts["exits.0.weight"] == 0 and counts["exits.0.bias"] == 1
