import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.macs import CountMacs
from dynanet.gates.scorers import ContextScorer, TileScorer
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.mechanisms.position_halting import PositionHalting, PositionPonderCost, steps_taken
from dynanet.ops.tiles import Tiles


class Told(nn.Module):
    """A halting logit that is told: input channel k of a map that the cells leave alone."""

    def __init__(self, k) -> None:
        super().__init__()
        self.k = k

    def forward(self, x):
        return x[:, self.k, :, :, None].logit()


# The vectors of the authors' act_test: scores before the last step; N + R, N, the weights of the states.
VECTORS = [
    ([0.999] * 4, 2.0, 1, [1, 0, 0, 0, 0]),
    ([0.01, 0.50, 0.60, 0.70], 3.49, 3, [0.01, 0.50, 0.49, 0, 0]),
    ([0.01] * 4, 5.96, 5, [0.01, 0.01, 0.01, 0.01, 0.96]),
]


class Count(nn.Conv2d):
    """Adds 1 to the last channel and nothing to the others, as a residual branch."""

    def __init__(self, channels) -> None:
        super().__init__(channels, channels, 1)
        nn.init.zeros_(self.weight)
        self.bias.data = torch.tensor([0.0] * (channels - 1) + [1.0])


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dilate", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_published_vectors(first, dilate, sparse):
    """Positions side by side with the scores of the three cases; the states are 1, 2, 3, 4, 5."""
    scores = torch.tensor([v[0] for v in VECTORS], dtype=torch.float64).T  # (4, 3)
    x = torch.cat([scores, torch.zeros(1, 3)]).double()[None, :, None, :].requires_grad_()

    class Start(nn.Module):
        def forward(self, x):
            return x + torch.tensor([0.0] * 4 + [1.0])[:, None, None]

    model = PositionHalting(
        [Count(5) for _ in range(4 if first else 5)],
        [Told(k) for k in range(4)],
        Tiles(1),
        first=Start() if first else None,
        residual=True,
        dilate=dilate,
    )
    model = execute(model.double().eval(), sparse=sparse)
    with record(model) as trace:
        y = model(x)
    weights = torch.tensor([v[3] for v in VECTORS], dtype=torch.float64)
    torch.testing.assert_close(y[0, 4, 0], (weights * torch.arange(1, 6)).sum(1))
    assert steps_taken(trace)[0, 0].tolist() == [v[2] for v in VECTORS]
    cost = PositionPonderCost()(None, None, trace)
    torch.testing.assert_close(cost.item(), sum(v[1] for v in VECTORS) / 3)
    (gradient,) = torch.autograd.grad(3 * cost, x)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    expected[:2, 1] = -1  # d cost / d h of the second case: -1, -1, 0, 0
    expected[:4, 2] = -1
    torch.testing.assert_close(gradient[0, :, 0], expected)


def cell(channels=4):
    return nn.Sequential(
        nn.Conv2d(channels, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, channels, 1)
    )


def sact(tile=1, *, dilate=True, bias=-0.5, first=None):
    torch.manual_seed(0)
    heads = [ContextScorer(4, tile, bias=bias, norm=True) for _ in range(3 if first is None else 4)]
    for head in heads:
        nn.init.normal_(head.local[-1].weight, std=0.5)
    cells = [cell() for _ in range(4)]
    return PositionHalting(cells, heads, Tiles(tile, 1), first=first, residual=True, dilate=dilate).eval()


def test_only_the_dilated_active_set_is_computed():
    """One position goes on: the 1x1 before the 3x3 runs on 9 positions, what follows on one."""
    model, x = sact(), torch.randn(1, 4, 7, 8)

    def one(decision):
        keep = torch.zeros_like(decision.keep)
        keep[:, 3, 4] = 1
        return keep

    macs = []
    for keep in (lambda d: torch.zeros_like(d.keep), one):
        with torch.no_grad(), forced(execute(model, sparse=True), keep), CountMacs() as count:
            model(x)
        macs.append(count.total)
    score = 9 * 4
    per_cell = 9 * 4 * 3 + 9 * 3 * 3 + 3 * 4
    assert macs[1] - macs[0] == 3 * per_cell + 2 * score  # no score after the last step


def test_all_kept_costs_what_the_dense_form_costs():
    cost = CostModel(sact(), torch.randn(1, 4, 5, 6))
    assert cost.worst == cost.full
    assert CostModel(sact(dilate=False), torch.randn(1, 4, 5, 6)).worst > cost.worst  # halos


@pytest.mark.parametrize("dilate", [False, True])
def test_positions_beside_a_halted_one_read_its_state(dilate):
    """The sparse answer at a position equals that of a plain loop with masks, written out."""
    model, x = sact(dilate=dilate).double(), torch.randn(2, 4, 6, 5).double()
    alive, total, mean, state = torch.ones(2, 1, 6, 5), torch.zeros(2, 1, 6, 5), 0, x
    for k, c in enumerate(model.cells):
        state = state + alive * c(state)
        h = model.halting[k](state)[..., 0][:, None].sigmoid() if k < 3 else torch.ones(2, 1, 6, 5)
        stays = alive * (total + h < 0.99)
        weight = stays * h + (alive - stays) * (1 - total)
        mean, total, alive = mean + weight * state, total + weight, stays
    with torch.no_grad(), record(execute(model, sparse=True)) as trace:
        torch.testing.assert_close(model(x), mean)
    steps = steps_taken(trace)
    assert len(steps.unique()) > 1, "all positions took as many steps: nothing was tested"


def test_the_ponder_cost_teaches_the_scores_to_halt():
    model, x = sact().train(), torch.randn(3, 4, 6, 5)
    optimizer, costs = torch.optim.SGD(model.halting.parameters(), lr=0.5), []
    for _ in range(10):
        with record(model) as trace:
            model(x)
        costs.append(PositionPonderCost()(None, None, trace))
        optimizer.zero_grad()
        costs[-1].backward()
        optimizer.step()
    assert costs[-1] < costs[0] - 0.1


def test_a_strided_first_unit():
    model = sact(first=nn.Conv2d(2, 4, 3, stride=2, padding=1))
    x = torch.randn(2, 2, 7, 9)
    with torch.no_grad(), record(execute(model, sparse=True)) as trace:
        assert model(x).shape == (2, 4, 4, 5)
    assert steps_taken(trace).shape == (2, 4, 5) and steps_taken(trace).min() >= 1


def test_all_halt_at_once_and_none_does():
    x = torch.randn(2, 4, 5, 6)
    for bias, steps in ((20.0, 1), (-20.0, 4)):
        model = sact(bias=bias)
        with torch.no_grad(), record(execute(model, sparse=True)) as trace:
            model(x)
        assert (steps_taken(trace) == steps).all()


def test_what_is_refused():
    with pytest.raises(ConfigError, match="between 0 and 1"):
        PositionHalting([cell()], TileScorer(4, 1), Tiles(1, 1), eps=0.0)
    with pytest.raises(StructureError, match="got 1"):
        PositionHalting([cell()] * 3, [TileScorer(4, 1)], Tiles(1, 1))
    with pytest.raises(StructureError, match="make them equal"):
        PositionHalting([cell()] * 2, ContextScorer(4, 2), Tiles(1, 1))
    inner = LayerSkip(nn.Conv2d(4, 4, 1), nn.Identity())
    with pytest.raises(StructureError, match="inside a spatial unit"):
        PositionHalting([inner], TileScorer(4, 1), Tiles(1, 1), dilate=True)
    model = nn.Sequential(LayerSkip(nn.Identity(), nn.Identity()))
    with record(model) as trace, pytest.raises(StructureError, match="with PositionHalting layers"):
        PositionPonderCost()(None, None, trace)
