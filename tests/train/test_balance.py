import math

import pytest
import torch
from torch import nn

from dynanet.core.dynamic import execute, record
from dynanet.core.errors import StructureError
from dynanet.core.gate import Gate
from dynanet.gates.rules import Threshold, TopK
from dynanet.mechanisms.experts import Experts, RouterScorer
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.train.balance import LoadBalance, RouterZ, load, load_variation
from dynanet.train.objectives import CrossEntropy

D, E = 8, 4


class Scores(nn.Module):
    """The input is the score."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x[..., :E]


def moe(k=1, scorer=None):
    return Experts([nn.Linear(D, D) for _ in range(E)], Gate(scorer or Scores(), TopK(k), units=E))


def heard(model, *inputs):
    with record(model.train()) as trace:
        model(*inputs)
    return trace


def scores(rows):
    return torch.cat([torch.as_tensor(rows, dtype=torch.float32), torch.zeros(len(rows), D - E)], 1)


def test_balance_is_one_for_equal_loads_and_the_experts_for_a_collapse():
    even = heard(moe(), scores(20 * torch.eye(E)))
    assert LoadBalance()(None, None, even).item() == pytest.approx(1.0, abs=1e-4)
    collapsed = heard(moe(), scores([[20.0, 0, 0, 0]] * 5))
    assert LoadBalance()(None, None, collapsed).item() == pytest.approx(E, abs=1e-4)
    assert load(even, "").tolist() == [0.25] * 4
    assert load_variation(even) == {"": 0.0}
    assert load_variation(collapsed)[""] == pytest.approx(math.sqrt(E - 1))


def test_balance_of_several_choices_by_hand():
    x = torch.randn(6, D)
    trace = heard(moe(2), x)
    score = x[:, :E]
    share = torch.zeros(E)
    for row in score.topk(2).indices.flatten():
        share[row] += 1 / 12
    expected = E * (share * score.softmax(1).mean(0)).sum()
    torch.testing.assert_close(LoadBalance()(None, None, trace).detach(), expected)


def test_z_by_hand():
    x = torch.randn(6, D)
    trace = heard(moe(), x)
    torch.testing.assert_close(RouterZ()(None, None, trace).detach(), x[:, :E].exp().sum(1).log().square().mean())


def test_padding_does_not_count():
    x, present = torch.randn(2, 5, D), torch.ones(2, 5)
    present[:, 3:] = 0
    for term in (LoadBalance(), RouterZ()):
        padded, cut = heard(moe(), x, present), heard(moe(), x[:, :3])
        torch.testing.assert_close(term(None, None, padded), term(None, None, cut))


@pytest.mark.parametrize("sparse", [False, True])
def test_losses_balance_a_router_that_collapsed(sparse):
    torch.manual_seed(0)
    model = execute(moe(scorer=RouterScorer(D, E)), sparse=sparse)
    x = torch.randn(64, D) + 2.0
    with torch.no_grad():
        model.gate.scorer.weight[0] += 0.6
    before = load_variation(heard(model, x))[""]
    optimizer = torch.optim.Adam(model.gate.parameters(), 0.05)
    for _ in range(60):
        loss = (LoadBalance() + 0.01 * RouterZ())(None, None, heard(model, x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before > 1.5
    assert load_variation(heard(model, x))[""] < 0.5


def test_layers_are_summed_and_may_be_named():
    torch.manual_seed(0)
    model = nn.Sequential(moe(), LayerSkip(nn.Linear(D, D), Gate(nn.Linear(D, 1), Threshold())), moe(2))
    trace = heard(model, torch.randn(9, D))
    parts = [LoadBalance([name])(None, None, trace) for name in ("0", "2")]
    torch.testing.assert_close(LoadBalance()(None, None, trace), parts[0] + parts[1])
    assert load_variation(trace).keys() == {"0", "2"}
    with pytest.raises(StructureError, match="elsewhere"):
        LoadBalance(["0", "elsewhere"])(None, None, trace)
    with pytest.raises(StructureError, match="several units"):
        RouterZ()(None, None, heard(model[1], torch.randn(9, D)))


def test_terms_add_to_others_and_tell_their_settings():
    torch.manual_seed(0)
    model, y = moe(), torch.tensor([0, 1, 2])
    objective = CrossEntropy() + 0.01 * LoadBalance() + 0.001 * RouterZ(["x"])
    assert repr(objective) == (
        "1 * CrossEntropy(label_smoothing=0.0) + 0.01 * LoadBalance(layers=None) + 0.001 * RouterZ(layers=('x',))"
    )
    with record(model) as trace:
        answer = model(torch.randn(3, D))
    loss = (CrossEntropy() + 0.01 * LoadBalance())(answer, y, trace)
    loss.backward()
    assert model.gate.scorer.scale.grad.abs() > 0
