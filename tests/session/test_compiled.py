"""Compiled parts answer as what they replace, in buffers that later passes may use again."""

import pytest
import torch
from torch import nn

from dynanet.core.dynamic import execute
from dynanet.core.gate import Gate
from dynanet.core.rows import LEADING
from dynanet.gates.rules import Threshold
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.session.compiled import CompiledHalt, CompiledPart, Workspaces, compiled
from dynanet.session.plan import plan_units
from dynanet.session.selector import EngineSelector

EAGER = ("eager", (1,), 1, None, torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def in_engines(model, x):
    model = execute(model.eval(), sparse=True)
    return compiled(model, plan_units(model, x, one_row=False), EngineSelector(*EAGER))


def halt(threshold=0.0):
    model = EarlyExit([nn.Linear(4, 4), nn.Linear(4, 4)], [nn.Linear(4, 3), nn.Linear(4, 3)])
    model.thresholds.fill_(threshold)
    return model


@pytest.mark.parametrize("rows", [0, 1, 2, 30])
def test_a_compiled_halt_answers_as_the_halt(rows):
    model, x = halt(), torch.randn(rows, 4)
    engines = in_engines(model, torch.randn(1, 4))
    assert isinstance(engines, CompiledHalt)
    torch.testing.assert_close(engines(x), model(x))


def test_one_row_stops_where_its_rule_says():
    model, x = halt(torch.inf), torch.randn(1, 4)
    engines = in_engines(model, x)
    calls = []
    engines.engines[1].listener = calls.append
    engines(x)
    assert len(calls) == 1
    model.thresholds.fill_(-torch.inf)
    engines(x)
    assert len(calls) == 1, "thresholds are those of the source"


def test_static_parts_are_replaced_and_the_rest_stays():
    skip = LayerSkip(nn.Linear(4, 4), Gate(nn.Linear(4, 1), Threshold()))
    model = nn.Sequential(nn.Linear(4, 4), skip, nn.ReLU()).eval()
    x = torch.randn(9, 4)
    expected = model(x)
    engines = in_engines(model, x[:1])
    assert engines is model and isinstance(engines[0], CompiledPart) and engines[1] is skip
    torch.testing.assert_close(engines(x), expected)
    assert not list(engines[0].parameters()), "its weights are in the engine"


def test_another_size_than_planned_runs_in_the_part_itself():
    part = in_engines(nn.Conv2d(1, 1, 1), torch.ones(1, 1, 4, 4))
    calls = []
    part.engine.listener = calls.append
    assert part(torch.ones(2, 1, 6, 6)).shape == (2, 1, 6, 6) and not calls
    assert part(torch.ones(0, 1, 4, 4)).shape == (0, 1, 4, 4) and not calls
    assert part(torch.ones(2, 1, 4, 4)).shape == (2, 1, 4, 4) and len(calls) == 1


def test_workspaces_gather_what_leading_rows_do_into_memory_they_use_again():
    spaces, x, addresses = Workspaces(), torch.randn(5, 3), []
    for index in (torch.tensor([0, 3, 4]), torch.tensor([1, 2])):
        spaces.begin()
        taken = spaces.take({"x": x, "other": None}, (5,), index)
        assert taken["other"] is None
        assert torch.equal(taken["x"], LEADING.take(x, (5,), index))
        addresses.append(taken["x"].data_ptr())
    assert addresses[0] == addresses[1]


def test_within_a_pass_nothing_is_overwritten_and_all_rows_are_not_copied():
    spaces, x = Workspaces(), torch.randn(5, 3)
    spaces.begin()
    first = spaces.take(x, (5,), torch.tensor([0, 1]))
    spaces.take(x, (5,), torch.tensor([3, 4]))
    assert torch.equal(first, x[:2])
    assert spaces.take([x], (5,), torch.arange(5))[0] is x
