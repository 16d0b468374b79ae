"""Skim-RNN: reading renews the whole state, skimming its first features, and each costs what it costs."""

import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, record
from dynanet.core.errors import ConfigError, InputError, StructureError
from dynanet.data.ragged import Sequences, pad
from dynanet.gates.rules import Gumbel, Sigmoid
from dynanet.mechanisms.skim import Skim, SkimCost
from dynanet.session import Session


def skim(kind=nn.GRUCell, rule=None, **options):
    torch.manual_seed(3)
    layer = Skim(kind(3, 6), kind(3 + 4, 2), 3, 6, 2, rule, **options).double()
    nn.init.normal_(layer.gate.scorer.weight)
    return layer


def by_hand(layer, x):
    """One sequence (T, 3), with if and else: the last state, and at which steps it was read."""
    lstm = isinstance(layer.big, nn.LSTMCell)
    states, reads = [x.new_zeros(1, 6)] * (2 if lstm else 1), []
    for t in range(len(x)):
        word = x[t : t + 1]
        reads.append(layer.gate.scorer(torch.cat([word, states[0]], 1)).item() > 0)
        if reads[-1]:
            new = layer.big(word, tuple(states) if lstm else states[0])
            states = list(new) if lstm else [new]
        else:
            heads = [s[:, :2] for s in states]
            new = layer.small(torch.cat([word, states[0][:, 2:]], 1), tuple(heads) if lstm else heads[0])
            heads = new if lstm else [new]
            states = [torch.cat([h, s[:, 2:]], 1) for h, s in zip(heads, states, strict=True)]
    return states[0][0], reads


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_recurrence_is_the_papers(kind, sparse):
    layer, xs = execute(skim(kind).eval(), sparse=sparse), [torch.randn(n, 3).double() for n in (8, 1, 13)]
    with torch.no_grad(), record(layer) as trace:
        answers = layer(pad(xs))
    keeps = torch.stack(trace[""], 1)
    for x, answer, keep in zip(xs, answers, keeps, strict=True):
        expected, reads = by_hand(layer, x)
        torch.testing.assert_close(answer, expected, rtol=1e-12, atol=1e-12)
        assert keep[: len(x), 0].bool().tolist() == reads and not keep[len(x) :].any()
        assert (keep[: len(x)].sum(1) == 1).all()
    assert 0 < keeps[2, :, 0].mean() < 1, "an example that does only one of the two proves nothing"


def test_skimming_costs_less():
    layer = skim().eval()
    cost = CostModel(layer, torch.randn(1, 7, 3).double())
    assert cost.unit[""].tolist() == [3 * 6 * (3 + 6), 3 * 2 * (3 + 4 + 2)]
    assert cost.always == 7 * (3 + 6)  # the scores


def test_gradients_of_the_choice_are_those_of_the_mixture():
    layer, x = skim(rule=Sigmoid()).train(), torch.randn(4, 1, 3).double()
    reads = layer.gate(torch.cat([x[:, 0], x.new_zeros(4, 6)], 1)).keep
    step = (x[:, 0], x.new_zeros(4, 6))
    torch.testing.assert_close(layer(x), reads * layer._read(step) + (1 - reads) * layer._skim(step))


def test_by_default_all_is_read_at_first_and_no_gradient_runs_through_the_choices():
    """Nor are choices drawn: train mode answers what eval mode does. As in the paper, both are otherwise."""
    torch.manual_seed(0)
    cells, x = (nn.GRUCell(3, 6), nn.GRUCell(3 + 4, 2)), torch.randn(8, 12, 3)
    ours, papers = Skim(*cells, 3, 6, 2), Skim(*cells, 3, 6, 2, Gumbel(), reading=0.0, detached=False)
    torch.testing.assert_close(ours.train()(x), ours.eval()(x))
    assert not torch.equal(papers.train()(x), papers(x))
    shares = []
    for layer in (ours, papers):
        with record(layer.train()) as trace:
            layer(x)
        score = trace.calls[-1].decision.score.sum()
        reached = torch.autograd.grad(score, layer.big.weight_hh, allow_unused=True)[0]
        assert (reached is None) == layer.detached
        shares.append(torch.stack(trace[""])[..., 0].mean())
    assert shares[0] == 1 and shares[1] < 0.8


def test_the_cost_is_the_log_probability_of_skimming():
    layer, x = skim().train(), torch.randn(2, 3, 3).double()
    with record(layer) as trace:
        layer(Sequences(x, torch.tensor([3, 1])))
    scores = torch.cat([call.decision.score for call in trace.calls], 1)
    expected = -torch.cat([scores[0], scores[1, :1]]).neg().sigmoid().log().mean()
    torch.testing.assert_close(SkimCost()(None, None, trace), expected)


def test_training_with_the_cost_skims():
    layer, x = skim().train(), torch.randn(16, 8, 3).double()
    optimizer = torch.optim.Adam(layer.gate.parameters(), 0.1)
    for _ in range(40):
        with record(layer) as trace:
            layer(x)
        optimizer.zero_grad()
        SkimCost()(None, None, trace).backward()
        optimizer.step()
    with torch.no_grad(), record(layer.eval()) as trace:
        layer(x)
    assert torch.stack(trace[""])[..., 0].mean() < 0.1


def test_every_step_one_step_and_no_row():
    layer, x = skim(every_step=True).eval(), torch.randn(2, 5, 3).double()
    states = layer(x)
    torch.testing.assert_close(states[0, 2], by_hand(layer, x[0, :3])[0])
    assert layer(x[:, :1]).shape == (2, 1, 6) and layer(x[:0]).shape == (0, 5, 6)


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
def test_a_session_puts_engines_in_place_of_the_cells(kind):
    layer, x = skim(kind).eval(), torch.randn(4, 7, 3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(Session(layer, x, engines="eager", batches=(1,))(x), layer(x))


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="6 of 6 hidden"):
        Skim(nn.GRUCell(3, 6), nn.GRUCell(3, 6), 3, 6, 6)
    with pytest.raises(InputError, match="at least one step"):
        skim()(torch.zeros(2, 0, 3))
    x = torch.randn(3, 4, 3).double()
    layer = skim().eval()
    clean = layer(x)
    x[1, 1] = torch.nan
    torch.testing.assert_close(layer(x)[[0, 2]], clean[[0, 2]])
    with record(other := nn.Linear(2, 2)) as trace:
        other(torch.zeros(1, 2))
    with pytest.raises(StructureError, match="model with Skim layers"):
        SkimCost()(None, None, trace)
