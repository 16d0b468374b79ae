import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import Gumbel, StraightThrough, Threshold
from dynanet.gates.scorers import ContextScorer, TileScorer
from dynanet.mechanisms.spatial_skip import SpatialBudget, SpatialSkip, anneal_bounds
from dynanet.ops.tiles import Tiles

C = 6


def bottleneck(groups=1):
    return nn.Sequential(
        nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=groups), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, C, 1),
    )  # fmt: skip


def layer(tile=1, rule=None, *, dilate=True, groups=1, bias=0.0):
    torch.manual_seed(0)
    scorer = ContextScorer(C, tile, bias=bias)
    nn.init.normal_(scorer.local[0].weight, std=0.5)
    model = SpatialSkip(bottleneck(groups), Gate(scorer, rule or Threshold()), Tiles(tile, 1), dilate=dilate)
    for m in model.branch:
        if isinstance(m, nn.BatchNorm2d):  # zero in is not zero out: a mask that is missing shows at the edge
            m.bias.data.normal_()
    return model.eval()


def spent_on(keep, model, x):
    with torch.no_grad(), forced(execute(model, sparse=True), keep), CountMacs() as count:
        model(x)
    return count.total


def none(decision):
    return torch.zeros_like(decision.keep)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_mask_is_dilated_for_the_3x3(groups):
    def corner_and_middle(decision):
        keep = torch.zeros_like(decision.keep)
        keep[:, 0, 0] = keep[:, 4, 5] = 1
        return keep

    model, x = layer(groups=groups), torch.randn(1, C, 7, 9)
    macs = spent_on(corner_and_middle, model, x) - spent_on(none, model, x)
    assert macs == (4 + 9) * C * 4 + 2 * (9 * 4 * 4 // groups + 4 * C)  # in the corner 4 of 9 exist


@pytest.mark.parametrize("dilate", [True, False])
@pytest.mark.parametrize(("tile", "height", "width"), [(1, 7, 5), (4, 9, 10), (8, 3, 5)])
def test_equals_a_mask_on_the_image(dilate, tile, height, width):
    model, x = layer(tile, dilate=dilate).double(), torch.randn(3, C, height, width).double()
    keep = (model.gate.scorer(x)[..., 0] > 0).double()
    assert 0 < keep.mean() < 1
    rows, columns = torch.arange(height) // tile, torch.arange(width) // tile
    expected = x + keep[:, rows][:, :, columns][:, None] * model.branch(x)
    with torch.no_grad():
        torch.testing.assert_close(execute(model, sparse=True)(x), expected)


def test_dilating_computes_nothing_twice():
    x = torch.randn(1, C, 8, 8)
    dense = CostModel(layer(), x).full
    assert CostModel(layer(), x).worst == dense
    assert CostModel(layer(dilate=False), x).worst > dense


def budgeted(rates):
    """Two layers that keep the first of ten positions so often, and the budget's terms of them."""
    model = nn.Sequential(*(layer(bias=1.0) for _ in rates))
    x = torch.randn(2, C, 1, 10)
    cost = CostModel(model, x)

    def keep(decision):
        rate = rates.pop(0)
        return (torch.arange(10) < 10 * rate).to(decision.keep)[None, None, :, None].expand_as(decision.keep)

    with torch.no_grad(), record(model) as trace, forced(model, keep):
        model(x)
    return cost, trace


def shares(cost, trace):
    """Told apart by hand: MACs of the 1x1 on the dilated mask, of the rest on the mask."""
    entry, rest = 4 * C, 36 * 4 + 4 * C
    spent = [(entry * k[0, ..., 0].sum() + rest * k[0, ..., 1].sum()).item() for k in trace.values()]
    return [s / (10 * (entry + rest)) for s in spent]


@pytest.mark.parametrize("tightness", [1.0, 0.4, 0.0])
def test_the_budget_by_hand(tightness):
    cost, trace = budgeted([0.2, 0.9])
    budget = SpatialBudget(0.5, cost)
    budget.tightness = tightness
    low, high = shares(cost, {name: trace[name][0] for name in trace.keys()})
    expected = ((low + high) / 2 - 0.5) ** 2
    expected += max(0, high - (1 - tightness * 0.5)) ** 2 / 2 + max(0, tightness * 0.5 - low) ** 2 / 2
    assert low < 0.25 and high > 0.9
    assert budget(torch.zeros(1, dtype=torch.float64), None, trace).item() == pytest.approx(expected)


def test_bounds_are_annealed():
    budget = SpatialBudget(0.5, CostModel(layer(), torch.randn(1, C, 4, 4)))
    at = anneal_bounds(budget, share=0.5)
    seen = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        at(progress)
        seen.append(budget.tightness)
    assert seen == pytest.approx([1.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("dilate", [True, False])
def test_the_budget_teaches_the_gate(dilate):
    model = layer(4, Gumbel(), bias=3.0, dilate=dilate).train()
    x = torch.randn(4, C, 12, 13)
    budget = SpatialBudget(0.3, CostModel(model, x))
    optimizer = torch.optim.Adam(model.gate.parameters(), lr=0.1)
    spent = []
    for _ in range(40):
        with record(model) as trace:
            answer = model(x)
        optimizer.zero_grad()
        budget(answer, None, trace).backward()
        optimizer.step()
        spent.append(trace[""][0][..., -1].mean().item())
    assert spent[0] > 0.8 and sum(spent[-5:]) / 5 < 0.5


def test_what_is_refused():
    with pytest.raises(StructureError, match="make them equal"):
        SpatialSkip(bottleneck(), Gate(TileScorer(C, 2), StraightThrough()), Tiles(4, 1))
    with pytest.raises(StructureError, match="stride-1"):
        SpatialSkip(nn.Conv2d(C, C, 3, 2, 1), Gate(TileScorer(C, 1), StraightThrough()), Tiles(1), dilate=True)
    cost = CostModel(layer(), torch.randn(1, C, 4, 4))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        SpatialBudget(1.5, cost)
    with pytest.raises(ConfigError, match="share"):
        anneal_bounds(SpatialBudget(0.5, cost), share=0)
    with record(nn.Sequential(layer())) as trace, pytest.raises(StructureError, match="no SpatialSkip made a decision"):
        SpatialBudget(0.5, cost)(None, None, trace)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("height", "width"), [(7, 9), (1, 1), (2, 5)])
def test_the_scorer_is_a_3x3_convolution_and_a_map_of_the_mean(norm, height, width):
    scorer, x = ContextScorer(C, norm=norm).double().eval(), torch.randn(3, C, height, width).double()
    plain = scorer.local(x) + scorer.overall(x)
    torch.testing.assert_close(scorer(x), plain[:, 0, :, :, None])
    assert scorer(x[:0]).shape == (0, height, width, 1)
