"""A plan names the largest parts that never decide, and each computes what it computes in the model."""

import torch
from torch import nn

from dynanet.core.gate import Gate
from dynanet.core.serving import CalledInParts
from dynanet.gates.rules import Threshold
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.session.plan import plan_units
from dynanet.session.pytree import tensors_of

X = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))


def skip():
    return LayerSkip(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Gate(nn.Linear(4, 1), Threshold()))


def plan(model, x=X, *, one_row=False):
    with torch.no_grad():
        return plan_units(model.eval(), x, one_row=one_row)


def test_a_static_model_is_one_part():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    found = plan(model)
    assert list(found.parts) == [""] and not found.halts and not found.one_row
    assert torch.equal(found.parts[""].unit.function(X)[0], model(X))


def test_the_largest_static_parts_are_found():
    body = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    found = plan(nn.Sequential(body, nn.ReLU(), skip(), nn.Sequential(nn.ReLU(), skip(), nn.Linear(4, 2))))
    assert {"0", "3.2"} <= set(found.parts), "and neither 0.1 nor what has no weights"
    assert all(name in ("0", "3.2") or name.startswith(("2.", "3.1.")) for name in found.parts)


def test_a_halt_is_planned_step_by_step():
    torch.manual_seed(0)
    model = EarlyExit([nn.Linear(4, 4), nn.Linear(4, 4)], [nn.Linear(4, 2), nn.Linear(4, 2)])
    found = plan(nn.Sequential(nn.Linear(4, 4), model))
    halt = found.halts["1"]
    assert list(found.parts) == ["0"], "none inside a halt"
    assert [unit.name for unit in halt.steps] == ["1.step0", "1.step1"] and halt.states == [1, 0]
    with torch.no_grad():
        x = found.parts["0"].unit.function(X)[0]
        state, answer, score = halt.steps[0].function(x)
        again = model.step(0, model.start(x))
        assert torch.equal(state, tensors_of(again[0])[0]) and torch.equal(answer, again[1])
        assert torch.equal(score, model.score(0, *again))
        assert torch.equal(halt.steps[1].function(state)[0], model.step(1, again[0])[1])


def test_what_is_called_in_parts_is_searched_and_not_taken():
    class Marked(nn.Module, CalledInParts):
        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(4, 4)

        def forward(self, x):
            return self.inside(x)

    found = plan(nn.Sequential(nn.Sequential(Marked()), skip()))
    assert "0.0.inside" in found.parts and "0" not in found.parts and "0.0" not in found.parts


def test_calls_with_arguments_by_name_or_without_rows_are_left_alone():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.named, self.mean, self.plain, self.skip = (
                nn.Linear(4, 4),
                nn.Bilinear(4, 4, 4),
                nn.Linear(4, 4),
                skip(),
            )

        def forward(self, x):
            x = self.named(input=self.plain(x))
            return self.skip(self.mean(x, x))

    class Mean(nn.Linear):
        def forward(self, x, y):
            return super().forward(x).mean()

    assert {"plain", "mean"} <= set(plan(Calls()).parts) and "named" not in plan(Calls()).parts
    model = Calls()
    model.mean = Mean(4, 4)
    model.skip.forward = lambda x: x
    assert "mean" not in plan(model).parts
