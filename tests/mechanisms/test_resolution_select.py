import pytest
import torch
from torch import nn

from dynanet import train
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.errors import BudgetError, ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import RelaxedTopK
from dynanet.gates.scorers import PooledScorer
from dynanet.mechanisms.path_select import price_for
from dynanet.mechanisms.resolution_select import ResolutionCost, ResolutionSelect
from dynanet.nets.spatial_transformer import Resize, resize
from dynanet.session import Session
from dynanet.testing import check_equal, check_neighbours

SIZES = (5, (9, 7), 12)


def network(channels=3):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def gate(channels=3, units=3, **rule):
    scorer = nn.Sequential(Resize(4), nn.Conv2d(channels, 4, 3), nn.ReLU(), PooledScorer(4, units, 0, bias=0.0))
    return Gate(scorer, RelaxedTopK(noise=True, hard=True, **rule), units=units)


def layer(channels=3, **rule):
    model = ResolutionSelect(network(channels), SIZES, gate(channels, **rule))
    for net in model.nets:  # statistics that differ from size to size
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2.0)
    return model


def undecided(model, x):
    """No size is favoured, so that images are of several."""
    with torch.no_grad():
        model.gate.scorer[-1].map.bias -= model.gate(x).score.mean(0)
    return model


def picking(*sizes):
    """Row i at size sizes[i]."""
    return lambda d: nn.functional.one_hot(torch.tensor(sizes), d.keep.shape[-1]).to(d.keep)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(7, 3, 13, 11)


def test_a_row_gets_the_answer_and_the_price_of_its_size(x):
    model = execute(layer().double().eval(), sparse=True)
    x = x[:4].double()
    cost = CostModel(model, x[:1])
    with torch.no_grad(), forced(model, picking(2, 0, 1, 0)), record(model) as trace:
        answers = model(x)
    for i, u in enumerate((2, 0, 1, 0)):
        with torch.no_grad(), CountMacs() as count:
            alone = model.nets[u][1](resize(x[i : i + 1], SIZES[u]))
        torch.testing.assert_close(answers[i : i + 1], alone, rtol=1e-12, atol=1e-12)
        assert cost.spent(trace)[i].item() == cost.always + count.total
    assert 1.5 * cost.unit[""][0] < cost.unit[""][1] < cost.unit[""][2] / 1.5


def test_rows_of_a_size_run_together_and_other_sizes_do_not_run(x):
    model, seen = execute(layer().eval(), sparse=True), []
    for u, net in enumerate(model.nets):
        net.register_forward_hook(lambda m, args, y, u=u: seen.append((u, len(args[0]))))
    with torch.no_grad(), forced(model, picking(2, 0, 2, 2, 0, 2, 2)):
        model(x)
    assert seen == [(0, 2), (2, 5)]


@pytest.mark.parametrize("sparse", [False, True])
def test_none_kept_is_the_first_and_several_are_averaged(x, sparse):
    model = execute(layer().eval(), sparse=sparse)
    alone = [net(x) for net in model.nets]
    with torch.no_grad(), forced(model, lambda d: torch.zeros_like(d.keep)), record(model) as trace:
        torch.testing.assert_close(model(x), alone[0])
    assert trace[""][0].tolist() == [[1.0, 0.0, 0.0]] * 7
    with torch.no_grad(), forced(model, everything):
        torch.testing.assert_close(model(x), sum(alone) / 3)


def test_sizes_share_weights_and_not_norms():
    model = layer()
    first, last = model.nets[0][1], model.nets[2][1]
    assert first[0].weight is last[0].weight and first[-1].weight is last[-1].weight
    assert first[1].weight is not last[1].weight and not torch.equal(first[1].running_mean, last[1].running_mean)


@pytest.mark.parametrize("channels", [1, 200])
@pytest.mark.parametrize("height, width", [(13, 11), (3, 4), (1, 1), (5, 17)])
def test_images_of_any_size_and_any_channels(channels, height, width):
    """Smaller than all candidates too: they are enlarged."""
    torch.manual_seed(0)
    check_equal(layer(channels), torch.randn(3, channels, height, width), draws=1)


def test_neighbours_do_not_matter(x):
    check_neighbours(layer(), x)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one(x, rows):
    model = layer().eval()
    for sparse in (False, True):
        assert execute(model, sparse=sparse)(x[:rows]).shape == (rows, 3)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_a_session_is_the_eager_sparse_form(x, engine):
    model = execute(undecided(layer().eval(), x), sparse=True)
    session = Session(model, x, engines=engine, batches=(4,))
    cost = CostModel(model, x[:1])
    with torch.no_grad():
        for batch in (x, x[:1], x[:0]):
            with record(model) as trace:
                expected = model(batch)
            with record(session) as ran:
                answers = session(batch)
            torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-5)
            if len(batch):
                assert torch.equal(ran[""][0], trace[""][0])
                torch.testing.assert_close(cost.spent(ran), cost.spent(trace))
    assert len(set(model.gate(x).keep.argmax(1).tolist())) > 1, "a dull example"
    assert len(session.engines()) == 4  # the predictor, and one per size


def test_in_training_all_sizes_see_all_rows_and_the_keeps_weigh_them(x):
    model = layer().train()
    with record(model) as trace:
        answer = model(x)
    keep = trace[""][0]
    torch.testing.assert_close(keep.sum(1), torch.ones(7))
    assert set(keep.detach().round(decimals=5).unique().tolist()) == {0.0, 1.0}
    (by_answer,) = torch.autograd.grad(answer.sum(), keep, retain_graph=True)
    for net in model.nets:
        net.eval()
    assert by_answer.shape == keep.shape and by_answer.any()
    answer.square().sum().backward()
    norms = [net[1][1].weight.grad for net in model.nets]
    assert all(g is not None for g in norms)
    assert model.gate.scorer[1].weight.grad.any()


def test_the_cost_term_is_the_relative_excess_and_moves_the_gate(x):
    torch.manual_seed(1)
    model = layer().train()
    cost = CostModel(model, x[:1])
    prices = cost.unit[""]
    target = cost.always + prices[0].item() + 1
    term = ResolutionCost(target, cost)
    with record(model) as trace:
        answer = model(x)
    mean = cost.always + (trace[""][0].detach().double() @ prices).mean()
    loss = term(answer, None, trace)
    assert loss.item() == pytest.approx(((mean - target) / (prices[2] - prices[0])).item(), rel=1e-5)
    assert loss.dtype == answer.dtype
    loss.backward()
    assert model.gate.scorer[1].weight.grad.any()
    with forced(model, picking(*[0] * 7)), record(model) as trace:
        answer = model(x)
    assert term(answer, None, trace) == 0


def test_a_gate_learns_which_images_need_the_large_size():
    """Fine stripes vanish at the small size, coarse ones do not; a border says which an image has."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip
    scorer = nn.Sequential(Resize(4), PooledScorer(1, 2, 8, bias=0.0))
    model = ResolutionSelect(net, (6, 12), Gate(scorer, RelaxedTopK(noise=True, hard=True), units=2))

    def draw(rows):
        y, fine, at = torch.randint(2, (rows,)), torch.randint(2, (rows,)), torch.arange(12)
        lines = torch.stack([at // 4 % 2, at % 2]).float()[fine] * 2 - 1
        x = lines[:, None].expand(-1, 12, -1)
        x = torch.where(y[:, None, None] > 0, x, x.transpose(1, 2)) + 2 * fine[:, None, None]
        return x[:, None] + 0.1 * torch.randn(rows, 1, 12, 12), y, fine

    cost = CostModel(model, draw(1)[0])
    target = cost.always + cost.unit[""].mean().item()  # half of the images at each size
    objective = train.CrossEntropy() + ResolutionCost(target, cost)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        x, y, _ = draw(64)
        with record(model.train()) as trace:
            answer = model(x)
        optimizer.zero_grad()
        objective(answer, y, trace).backward()
        optimizer.step()
    x, y, fine = draw(300)
    with torch.no_grad(), record(execute(model.eval(), sparse=True)) as trace:
        right = (model(x).argmax(1) == y).float().mean()
    large = trace[""][0][:, 1]
    assert right > 0.95 and large[fine == 1].mean() > 0.95 and large[fine == 0].mean() < 0.3


def test_other_budgets_without_training_again(x):
    model = execute(undecided(layer(costs=[0.2, 0.5, 1.0]).eval(), x), sparse=True)
    score = model.gate(x).score
    for budget in (0.25, 0.5):
        model.gate.rule.price.fill_(price_for(score, [0.2, 0.5, 1.0], budget))
        with torch.no_grad(), record(model) as trace:
            model(x)
        assert (trace[""][0] @ torch.tensor([0.2, 0.5, 1.0])).mean() <= budget


def test_what_does_not_fit_together_is_refused(x):
    with pytest.raises(ConfigError, match="give two or more"):
        ResolutionSelect(network(), [5], gate(units=1))
    with pytest.raises(ConfigError, match="size must be at least 1"):
        ResolutionSelect(network(), [0, 5], gate(units=2))
    with pytest.raises(StructureError, match="2 units; expected 3, the number of sizes"):
        ResolutionSelect(network(), SIZES, gate(units=2))
    with pytest.raises(StructureError, match="keeps 2 sizes of every row"):
        ResolutionSelect(network(), SIZES, gate(k=2))
    with pytest.raises(ConfigError, match="2 costs for 3"):
        ResolutionSelect(network(), SIZES, gate(costs=[1.0, 2.0]))
    cost = CostModel(layer(), x[:1])
    with pytest.raises(BudgetError, match="below the .* of the cheapest"):
        ResolutionCost(cost.always, cost)
    with pytest.raises(StructureError, match="no layer 'body'"):
        ResolutionCost(1e9, cost, layer="body")
