"""What exits share is averaged over those that reach it, and nothing else changes."""

import pytest
import torch
from torch import nn

from dynanet.core.dynamic import record
from dynanet.core.errors import StructureError
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.train.equilibrium import exits_reached, rescale_gradients


def exits(count=3):
    torch.manual_seed(0)
    return EarlyExit([nn.Linear(4, 4) for _ in range(count)], [nn.Linear(4, 2) for _ in range(count)]).train()


def traced(model):
    with record(model) as trace:
        model(torch.ones(3, 4))
    return trace


def test_a_stage_reaches_its_exit_and_all_later_ones():
    model = exits()
    counts = exits_reached(traced(model))
    assert [counts[stage.weight] for stage in model.stages] == [3, 2, 1]
    assert [counts[exit.weight] for exit in model.exits] == [1, 1, 1]


def test_gradients_become_the_mean_over_the_exits():
    model = exits()
    trace = traced(model)
    answers = trace.answers[""]
    counts = exits_reached(trace)
    alone = [
        torch.autograd.grad(answer.square().sum(), model.stages[0].weight, retain_graph=True)[0] for answer in answers
    ]
    sum(answer.square().sum() for answer in answers).backward()
    rescale_gradients(counts)
    torch.testing.assert_close(model.stages[0].weight.grad, torch.stack(alone).mean(0))


def test_weights_without_a_gradient_and_of_one_exit_stay():
    shared, own, still = (nn.Parameter(torch.ones(2)) for _ in range(3))
    shared.grad, own.grad = torch.full((2,), 6.0), torch.full((2,), 6.0)
    rescale_gradients({shared: 3, own: 1, still: 2})
    assert shared.grad.tolist() == [2, 2] and own.grad.tolist() == [6, 6] and still.grad is None


def test_which_exits_must_be_clear():
    one, two = traced(exits()), traced(nn.Sequential(exits(), nn.Linear(2, 4), exits()))
    with pytest.raises(StructureError, match="the exits of 'backbone' in the trace, found those of"):
        exits_reached(one, "backbone")
    with pytest.raises(StructureError, match=r"one Halt in the trace, found those of \['0', '2'\]"):
        exits_reached(two)
    assert max(exits_reached(two, "2").values()) == 3
    with pytest.raises(StructureError, match=r"found those of \[\]"):
        exits_reached(traced(nn.Linear(4, 4)))
