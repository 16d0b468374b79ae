import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import StructureError
from dynanet.core.gate import Gate
from dynanet.gates.recurrent import RecurrentGate
from dynanet.gates.rules import Gumbel, Sigmoid, StraightThrough, Threshold
from dynanet.mechanisms.layer_skip import BranchSkip, LayerSkip, RecurrentSkip
from dynanet.session import Session
from dynanet.train import CrossEntropy, TargetRate


def test_branch_skip_is_the_papers_sum():
    torch.manual_seed(0)
    branch, shortcut, x = nn.Linear(4, 6), nn.Linear(4, 6), torch.randn(5, 4)
    skip = BranchSkip(branch, Gate(nn.Linear(4, 1), Sigmoid()), shortcut, nn.ReLU()).train()
    keep = skip.gate(x).keep
    torch.testing.assert_close(skip(x), (shortcut(x) + keep * branch(x)).relu())


def test_branch_skip_runs_the_shortcut_once_and_layer_skip_twice():
    branch, shortcut, x = nn.Linear(4, 6), nn.Linear(4, 6), torch.randn(1, 4)
    gate = Gate(nn.Linear(4, 1), Threshold(-torch.inf))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.shortcut = branch, shortcut

        def forward(self, x):
            return self.shortcut(x) + self.branch(x)

    once, twice = BranchSkip(branch, gate, shortcut), LayerSkip(Block(), gate, shortcut)
    torch.testing.assert_close(once(x), twice(x))
    assert CostModel(twice, x).worst - CostModel(once, x).worst == 4 * 6


def chain():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
    return RecurrentSkip(blocks, RecurrentGate([4] * 3, StraightThrough(), bias=0.0)).eval()


def test_a_recurrent_chain_decides_block_by_block():
    model, x = chain(), torch.randn(16, 4)
    with record(model) as trace:
        model(x)
    assert [call.first for call in trace.calls] == [0, 1, 2]
    keeps = torch.cat(trace[""], 1)
    assert 0 < keeps.mean() < 1
    expected, cost = torch.zeros(16, dtype=torch.float64), CostModel(model, x)
    for k in range(3):
        expected += keeps[:, k] * cost.unit[""][k]
    torch.testing.assert_close(cost.spent(trace), cost.always + expected)


def test_the_gate_sees_what_was_skipped():
    """The second decision hangs on the first: the block's input changed, and the memory with it."""
    model, x = chain(), torch.randn(8, 4)
    scores = []
    for first in (0.0, 1.0):
        with forced(model, lambda d, first=first: torch.full_like(d.keep, first)), record(model) as trace:
            model(x)
        scores.append([call.decision.score for call in trace.calls])
    torch.testing.assert_close(scores[0][0], scores[1][0])
    assert not torch.allclose(scores[0][1], scores[1][1])


@pytest.mark.parametrize("blocks, shortcuts", [(2, None), (3, 2), (0, None)])
def test_blocks_gates_and_shortcuts_must_match(blocks, shortcuts):
    otherwise = None if shortcuts is None else [nn.Identity()] * shortcuts
    with pytest.raises(StructureError, match="3 blocks got"):
        RecurrentSkip([nn.Linear(4, 4)] * blocks, RecurrentGate([4] * 3, StraightThrough()), otherwise)


def test_a_recurrent_chain_in_a_session():
    model, x = chain(), torch.randn(9, 4)
    session = Session(model, x, engines="eager")
    with record(session) as trace:
        answer = session(x)
    with torch.no_grad(), record(execute(model, sparse=False)) as expected:
        torch.testing.assert_close(answer, model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trace[""], expected[""])


class Turn(nn.Module):
    """A branch that half the rows need: added, it turns the second feature round where the first, a flag, is up."""

    def forward(self, x):
        return torch.cat([0 * x[:, :1], torch.where(x[:, :1] > 0, -2 * x[:, 1:2], 0 * x[:, 1:2]), 0 * x[:, 2:]], 1)


class SignOfSecond(nn.Module):
    def forward(self, x):
        return torch.stack([-4 * x[:, 1], 4 * x[:, 1]], 1)


@pytest.mark.parametrize("rule", [Gumbel(), Sigmoid(), StraightThrough()], ids=lambda rule: type(rule).__name__)
def test_a_trained_gate_beats_a_random_one_of_its_rate(rule):
    """ConvNet-AIG's loss on a given network, of which half the rows need the branch and nothing says which."""
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(0)
    model = nn.Sequential(BranchSkip(Turn(), Gate(nn.Linear(4, 1), rule)), SignOfSecond())
    optimizer, objective = torch.optim.Adam(model.parameters(), 0.05), CrossEntropy() + 5 * TargetRate(0.5)

    def draw(rows):
        x = torch.randn(rows, 4, generator=generator)
        return x, ((x + Turn()(x))[:, 1] > 0).long(), x[:, 0] > 0

    for _ in range(150):
        x, y, _ = draw(128)
        with record(model.train()) as trace:
            answer = model(x)
        optimizer.zero_grad()
        objective(answer, y, trace).backward()
        optimizer.step()
    x, y, hard = draw(2000)
    with torch.no_grad(), record(execute(model.eval(), sparse=True)) as trace:
        answer = model(x)
    keep = trace["0"][0][:, 0]
    shuffled = keep[torch.randperm(len(x), generator=generator)]
    with torch.no_grad(), forced(model, lambda d: shuffled[:, None]):
        random = model(x)
    learnt, by_chance = ((a.argmax(1) == y).double().mean().item() for a in (answer, random))
    assert keep[hard].mean() > keep[~hard].mean() + 0.3
    assert learnt > by_chance + 0.05


@pytest.mark.parametrize("make", [LayerSkip, BranchSkip])
def test_one_layer_is_one_unit(make):
    with pytest.raises(StructureError, match="decides on 4 units"):
        make(nn.Linear(6, 6), Gate(nn.Linear(6, 4), Threshold(), units=4))
