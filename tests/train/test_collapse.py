import warnings

import pytest
import torch
from torch import nn

from dynanet.core.dynamic import Dynamic, record
from dynanet.core.gate import Gate
from dynanet.gates.expert_rules import BatchCoupledTopK
from dynanet.gates.recurrent import RecurrentGate
from dynanet.gates.rules import Bernoulli, Gumbel, RelaxedTopK, StraightThrough, TopK
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip, RecurrentSkip
from dynanet.train.collapse import CollapseAlarm, collapsed, loads


class Experts(Dynamic):
    """Runs the expert that its gate keeps; here it only decides."""

    def __init__(self, bias, k=1, padding=0.0, rule=None) -> None:
        super().__init__()
        self.padding = padding
        self.gate = Gate(nn.Linear(4, len(bias)), rule or TopK(k), units=len(bias))
        self.gate.scorer.bias.data.copy_(torch.tensor(bias))

    def forward(self, x):
        present = torch.ones(len(x), 1)
        present[: round(self.padding * len(x))] = 0
        keep = self.tap(self.gate(x), present=present).keep
        return x * keep.sum(1, keepdim=True)


def skip(bias, rule=None):
    torch.manual_seed(0)
    gate = Gate(nn.Linear(4, 1), rule or StraightThrough())
    nn.init.constant_(gate.scorer.bias, bias)
    return LayerSkip(nn.Linear(4, 4), gate)


def traced(model, rows=400):
    torch.manual_seed(1)
    with record(model.train()) as trace:
        model(torch.randn(rows, 4))
    return trace


@pytest.mark.parametrize("rule", [StraightThrough(), Gumbel(), Bernoulli()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("bias, collapses", [(0.0, False), (20.0, True), (-20.0, True)])
def test_a_rate_near_0_or_1(rule, bias, collapses):
    found = collapsed(loads(traced(nn.Sequential(skip(0.3), skip(bias, rule)))))
    assert list(found) == (["1"] if collapses else [])
    if collapses:
        assert f"the gate of '1' has collapsed: it kept {'100.0' if bias > 0 else '0.0'}%" in found["1"]


def test_experts_are_judged_by_their_spread_and_not_by_their_number():
    even, one = Experts([0.0] * 64), Experts([9.0] + [0.0] * 7)
    found = loads(traced(nn.Sequential(even, one)))
    assert found["0"].rate() < 0.02 and found["0"].spread() < 2
    assert found["1"].spread() == pytest.approx(7**0.5)
    wrong = collapsed(found)
    assert list(wrong) == ["1"] and "of '1' have collapsed" in wrong["1"] and "100%" in wrong["1"]


def test_loads_are_counted_per_unit_over_calls():
    torch.manual_seed(0)
    chain = RecurrentSkip([nn.Linear(4, 4) for _ in range(3)], RecurrentGate([4] * 3, Bernoulli(), bias=0.0))
    trace = traced(chain, 50)
    load = loads(trace)[""]
    torch.testing.assert_close(load.kept, torch.cat(trace[""], 1).sum(0))
    assert load.rows.tolist() == [50, 50, 50] and not load.compete
    both = load + load
    assert both.rate() == load.rate() and both.rows.tolist() == [100] * 3


def test_an_exit_is_no_gate_and_eval_mode_no_training():
    exits = EarlyExit([skip(20.0), nn.Linear(4, 4)], [nn.Linear(4, 2), nn.Linear(4, 2)])
    assert list(loads(traced(exits))) == ["stages.0"]
    with record(exits.eval()) as trace:
        exits(torch.randn(300, 4))
    assert loads(trace) == {}


def test_too_few_decisions_tell_nothing():
    assert not collapsed(loads(traced(skip(20.0), 50)))


def test_a_loop_of_your_own_is_warned_once():
    alarm, model = CollapseAlarm(), skip(20.0)
    alarm.log(traced(model, 150))
    alarm.warn()  # too early: counted on
    alarm.log(traced(model, 150))
    with pytest.warns(UserWarning, match="the gate of '' has collapsed"):
        alarm.warn()
    alarm.log(traced(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alarm.warn()


@pytest.mark.parametrize(
    "units, settings",
    [
        *((2, {}), (4, {}), (8, {"padding": 0.3}), (8, {"k": 2}), (4, {"rule": RelaxedTopK()})),
        (8, {"rule": BatchCoupledTopK(2, 2.0)}),
    ],
    ids=str,
)
def test_few_units_padding_and_limits_hide_no_collapse(units, settings):
    k = settings.get("k", getattr(settings.get("rule"), "k", 1))
    one, even = Experts([99.0] * k + [0.0] * (units - k), **settings), Experts([0.0] * units, **settings)
    wrong = collapsed(loads(traced(nn.Sequential(one, even))))
    assert list(wrong) == ["0"] and "the units of '0' have collapsed" in wrong["0"]


def test_rates_in_half_precision_are_counted_to_the_end():
    with torch.autocast("cpu", torch.bfloat16):
        found = [loads(traced(nn.Sequential(skip(0.0)), rows=4096)) for _ in range(12)]
    total = found[0]["0"]
    for load in found[1:]:
        total = total + load["0"]
    assert float(total.rows.sum()) == 12 * 4096
