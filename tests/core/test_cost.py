import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import Dynamic, everything, execute, forced, layers, record
from dynanet.core.errors import InputError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import RelaxedTopK, Sigmoid, StraightThrough, Threshold
from dynanet.gates.scorers import TileScorer
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.mechanisms.spatial_skip import SpatialSkip
from dynanet.mechanisms.token_drop import TokenDrop
from dynanet.ops.tiles import Tiles
from dynanet.ops.tokens import Tokens, attend
from dynanet.testing import random_decisions

D = 4
SQUARE = D * D


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def square():
    return nn.Linear(D, D)


def skip(block, rule=None):
    return LayerSkip(block, Gate(nn.Linear(D, 1), rule or Threshold()))


def exits(stages=None, steps=4):
    stages = stages or [square() for _ in range(steps)]
    return EarlyExit(stages, [nn.Linear(D, 3) for _ in stages]).eval()


def recorded(model, x):
    with torch.no_grad(), record(model) as trace:
        model(x)
    return trace


def test_a_static_model_always_costs_all():
    cost = CostModel(nn.Sequential(square(), nn.ReLU(), nn.Linear(D, 3)), torch.randn(5, D))
    assert cost.always == cost.full == cost.worst == SQUARE + 12
    assert cost.unit == {}


def test_the_first_step_always_runs_and_unit_k_is_the_step_after_it():
    model = exits([square(), nn.Linear(D, D), nn.Sequential(square(), square())])
    cost = CostModel(model, torch.randn(2, D))
    assert cost.always == SQUARE + 12
    assert cost.unit[""].tolist() == [SQUARE + 12, 2 * SQUARE + 12]
    assert cost.full == cost.worst == 4 * SQUARE + 36


def test_a_gate_always_runs_and_a_layer_inside_has_its_own_price():
    model = skip(nn.Sequential(square(), skip(nn.Linear(D, D)), nn.Linear(D, D)))
    cost = CostModel(model, torch.randn(3, D))
    assert cost.always == D
    assert cost.unit[""].tolist() == [2 * SQUARE + D], "the inner gate runs with the outer unit"
    assert cost.unit["block.1"].tolist() == [SQUARE]
    assert cost.full == cost.worst == 2 * D + 3 * SQUARE


class OneOf(Dynamic):
    """Of several units a row runs one; where more are forced, all of those."""

    max_units = 1

    def __init__(self, *units) -> None:
        super().__init__()
        self.gate = Gate(nn.Linear(D, len(units)), RelaxedTopK(), units=len(units))
        self.units = nn.ModuleList(units)

    def forward(self, x):
        keep, y = self.tap(self.gate(x)).keep, torch.zeros_like(x)
        for u, unit in enumerate(self.units):
            y = y + self.run(u, unit, keep[..., u], x, otherwise=torch.zeros_like(x))
        return y


def test_of_units_that_exclude_each_other_the_dearest_counts():
    """Three ways: a square; a square that may be skipped; three squares of which two exclude each other."""
    inner = OneOf(square(), nn.Sequential(square(), square()))
    model = OneOf(square(), skip(square()), nn.Sequential(square(), inner)).eval()
    cost = CostModel(model, torch.randn(3, D))
    most_expensive = 3 * D + SQUARE + 2 * D + 2 * SQUARE
    assert cost.full == cost.worst == most_expensive
    assert cost.unit[""].tolist() == [SQUARE, D, SQUARE + 2 * D]
    assert cost.unit["units.2.1"].tolist() == [SQUARE, 2 * SQUARE]
    x = torch.randn(60, D)
    spent = cost.spent(recorded(model, x))
    assert spent.max() == most_expensive and spent.min() < most_expensive
    with cost.most_expensive(model):
        assert (cost.spent(recorded(model, x)) == cost.worst).all()
    inner.max_units = 2
    assert CostModel(model, x[:1]).worst == most_expensive + SQUARE


def test_a_shared_layer_has_one_price_and_is_paid_per_call():
    cell = skip(square())
    model = nn.Sequential(cell, nn.Tanh(), cell, nn.Tanh(), cell).eval()
    cost = CostModel(model, torch.randn(2, D))
    assert cost.unit["0"].tolist() == [SQUARE] and cost.worst == 3 * (D + SQUARE)
    with forced(model, everything):
        assert cost.spent(recorded(model, torch.randn(2, D))).tolist() == [3 * (D + SQUARE)] * 2


def test_a_halo_is_paid_for_in_the_sparse_form_only():
    """A 1x1 convolution from 3 to 2 channels and a 3x3 one back, on 5 x 6 positions in tiles of 4 with a halo of 1."""
    branch = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 3, padding=1))
    cost = CostModel(SpatialSkip(branch, Gate(TileScorer(3, 4), Threshold()), Tiles(4, 1)), torch.randn(2, 3, 5, 6))
    assert cost.always == 5 * 6 * 3, "the scorer's 1x1 convolution"
    assert cost.full == cost.always + 5 * 6 * (6 + 54)
    assert cost.unit[""].tolist() == [6 * 6 * 6 + 4 * 4 * 54], "the halo goes through the first convolution"
    assert cost.worst == cost.always + 4 * cost.unit[""].item()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, tokens):
        return tokens._replace(x=tokens.x + self.out(attend(*self.qkv(tokens.x).chunk(3, -1), tokens, heads=2)))


class OfTokens(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(Tokens(x)).x


def test_attention_is_linear_and_quadratic_in_the_tokens_that_stay():
    model = OfTokens(TokenDrop(Attention(), Gate(nn.Linear(D, 1), Threshold()))).eval()
    for samples in (1, 3):
        cost = CostModel(model, torch.randn(samples, 7, D))
        assert cost.unit["body"].tolist() == [[4 * SQUARE, 2 * D]]
        assert cost.always == 7 * D
    trace = recorded(model, torch.randn(3, 7, D))
    n = trace["body"][0].flatten(1).sum(1).double()
    assert torch.equal(cost.spent(trace), 7 * D + 4 * SQUARE * n + 2 * D * n * n)


def test_one_token_cannot_tell_linear_from_quadratic():
    model = OfTokens(TokenDrop(Attention(), Gate(nn.Linear(D, 1), Threshold())))
    with pytest.raises(StructureError, match="degree 2.*at least 2 rows"):
        CostModel(model, torch.randn(3, 1, D))


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_prices_do_not_hang_on_the_size_of_the_example_nor_on_its_decisions(samples):
    torch.manual_seed(0)
    model = exits([square(), skip(square()), nn.Sequential(square(), skip(skip(square())))])
    reference, cost = (CostModel(model, torch.randn(n, D)) for n in (7, samples))
    assert (cost.full, cost.always, cost.worst) == (reference.full, reference.always, reference.worst)
    for name, prices in reference.unit.items():
        assert torch.equal(cost.unit[name], prices)


@given(st.integers(0, 5), st.integers(0, 9), st.booleans())
@settings(max_examples=25, deadline=None)
def test_what_was_spent_is_what_runs_when_a_sample_runs_alone(batch, seed, sparse):
    torch.manual_seed(seed)
    model = exits([square(), skip(nn.Sequential(square(), skip(square()))), square()]).double()
    x = torch.randn(batch, D, dtype=torch.float64)
    cost = CostModel(model, torch.randn(1, D, dtype=torch.float64))
    with forced(model, random_decisions(seed)):
        spent = cost.spent(recorded(execute(model, sparse=sparse), x))
        execute(model, sparse=True)
        for i in range(batch):
            with torch.no_grad(), CountMacs() as count:
                model(x[i : i + 1])
            assert spent[i] == count.total
    assert spent.shape == (batch,) and (spent <= cost.worst).all()


def test_a_limit_lowers_the_worst_case_and_nothing_spends_more():
    model, x = exits(), torch.randn(6, D)
    step = SQUARE + 12
    for limit, worst in ((None, 4 * step), (3, 3 * step), (2, 2 * step), (1, step), (7, 4 * step)):
        model.limit = limit
        cost = CostModel(model, x)
        assert cost.worst == worst
        with forced(model, everything):
            assert cost.spent(recorded(model, x)).tolist() == [worst] * 6


def test_a_limit_raised_after_pricing_is_noticed_and_not_taken_for_free():
    model, x = exits(), torch.randn(2, D)
    model.limit = 2
    cost = CostModel(model, x)
    model.limit = None
    with pytest.raises(StructureError, match="unit 1.*limit"):
        cost.spent(recorded(model, x))


def test_a_limit_lowered_after_pricing_needs_no_new_prices():
    model, x = exits(), torch.randn(2, D)
    cost = CostModel(model, x)
    model.limit = 2
    assert cost.spent(recorded(model, x)).tolist() == [2 * (SQUARE + 12)] * 2


def test_steps_are_the_costs_of_leaving_after_each():
    model = exits([square(), nn.Sequential(square(), square()), square()])
    cost = CostModel(model, torch.randn(1, D))
    with forced(model, everything):
        steps = cost.steps(recorded(model, torch.randn(5, D)))
    assert steps.tolist() == [[28, 72, 100]] * 5
    assert steps[0, -1] == cost.full


def test_steps_count_the_decisions_inside_them_as_they_were_made():
    model = exits([skip(square()), nn.Sequential(square(), skip(square())), square()])
    x = torch.randn(20, D)
    cost = CostModel(model, x[:1])
    with forced(model.stages, random_decisions(3)):
        trace = recorded(model, x)
    first, second = trace["stages.0"][0][:, 0], trace["stages.1.1"][0][:, 0]
    assert 0 < first.sum() < 20 and 0 < second.sum() < 20
    steps = cost.steps(trace)
    assert torch.equal(steps[:, 0], D + SQUARE * first + 12)
    assert torch.equal(steps[:, 1] - steps[:, 0], SQUARE + D + SQUARE * second.double() + 12)
    assert (steps[:, 2] - steps[:, 1] == SQUARE + 12).all()
    assert torch.equal(steps[:, -1], cost.spent(trace))


def test_steps_of_a_halt_that_lies_within_a_model():
    model = nn.Sequential(skip(square()), exits(), nn.Softmax(-1)).eval()
    cost = CostModel(model, torch.randn(1, D))
    with forced(model, everything):
        trace = recorded(model, torch.randn(3, D))
    assert cost.steps(trace, "1")[0].tolist() == [20 + 28 * k for k in (1, 2, 3, 4)]
    model[1].limit = 1
    with forced(model, everything):
        assert cost.steps(recorded(model, torch.randn(3, D)), "1").tolist() == [[48]] * 3


def test_a_copy_is_priced_by_name():
    model, x = exits([square(), skip(square()), square()]), torch.randn(9, D)
    cost, twin = CostModel(model, x), copy.deepcopy(model)
    twin.thresholds.fill_(0.1)
    model.thresholds.fill_(0.1)
    spent = cost.spent(recorded(twin, x))
    assert torch.equal(spent, cost.spent(recorded(model, x))) and len(set(spent.tolist())) > 1


def test_in_training_what_was_spent_is_the_expected_cost_and_every_gate_hears_it():
    model = skip(nn.Sequential(square(), skip(square(), Sigmoid())), Sigmoid()).train()
    cost, x = CostModel(model, torch.randn(1, D)), torch.randn(6, D)
    with record(model) as trace:
        model(x)
    outer, inner = trace[""][0][:, 0], trace["block.1"][0][:, 0]
    spent = cost.spent(trace)
    assert torch.allclose(spent, D + outer.double() * (SQUARE + D) + inner.double() * SQUARE)
    spent.mean().backward()
    for layer in layers(model).values():
        assert layer.gate.scorer.weight.grad.abs().sum() > 0


def test_modes_and_forms_come_back_also_after_an_error():
    model = nn.Sequential(skip(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)), StraightThrough()), skip(square()))
    model.train()
    model[0].block.eval()
    model[0].sparse = True
    before = [(m.training, getattr(m, "sparse", None)) for m in model.modules()]
    CostModel(model, torch.randn(2, D))
    assert [(m.training, getattr(m, "sparse", None)) for m in model.modules()] == before
    with pytest.raises(InputError, match="cannot take this example"):
        CostModel(model, torch.randn(2, D + 1))
    assert [(m.training, getattr(m, "sparse", None)) for m in model.modules()] == before
    assert all(layer.trace is None and layer.force is None for layer in layers(model).values())


def test_an_example_may_be_a_pytree():
    class OfDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = square()

        def forward(self, given):
            return self.map(given["x"]) * given["factor"]

    assert CostModel(OfDict(), {"factor": 3.0, "x": torch.randn(5, D)}).full == SQUARE


def test_an_empty_example_is_refused():
    with pytest.raises(StructureError, match="at least one sample"):
        CostModel(square(), torch.randn(0, D))


def test_traces_that_cannot_be_priced_say_why():
    model = exits()
    cost = CostModel(model, torch.randn(1, D))
    static = square()
    with record(model) as untouched, record(static) as nothing:
        static(torch.randn(2, D))
    other = recorded(skip(square()).eval(), torch.randn(2, D))
    inside = recorded(nn.Sequential(skip(square())).eval(), torch.randn(2, D))
    for price in (cost.spent, cost.steps):
        with pytest.raises(StructureError, match="nothing was decided"):
            price(untouched)
    with pytest.raises(StructureError, match="without dynamic layers: every sample costs"):
        cost.spent(nothing)
    with pytest.raises(StructureError, match="layer '0' that this cost model never saw"):
        cost.spent(inside)
    with pytest.raises(StructureError, match=r"'head' is not a layer of this trace; there are \[''\]"):
        cost.steps(other, "head")


def test_the_table_shows_every_unit_and_adds_up():
    model = nn.Sequential(exits(), nn.Identity(), nn.Linear(3, D), skip(nn.Sequential(square(), nn.Linear(D, D))))
    cost = CostModel(model, torch.randn(1, D))
    lines = str(cost).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "(always)", "0", "0", "0", "3", "full", "worst"]
    macs = [int(re.findall(r"(\d[\d,]*) +[\d.]+%", line)[0].replace(",", "")) for line in lines[1:]]
    assert sum(macs[:-2]) == macs[-1] == cost.worst and macs[-2] == cost.full
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[1:-2]]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_the_table_of_a_price_with_two_terms_and_of_nothing():
    model = OfTokens(TokenDrop(Attention(), Gate(nn.Linear(D, 1), Threshold())))
    assert "64 + 8" in str(CostModel(model, torch.randn(1, 7, D)))
    assert "0.0%" in str(CostModel(nn.ReLU(), torch.randn(1, 7)))
