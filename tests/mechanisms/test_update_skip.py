"""Skip RNN: the recurrence is the paper's, what is skipped is not computed, and padding costs nothing."""

import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.errors import ConfigError, InputError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.data.ragged import Sequences, pad
from dynanet.gates.rules import Threshold
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.mechanisms.update_skip import UpdateCost, UpdateSkip
from dynanet.session import Session


def skipping(cell=None, bias=-1.0, **options):
    torch.manual_seed(1)
    layer = UpdateSkip(cell or nn.GRUCell(3, 5), 3, 5, **options).double()
    nn.init.constant_(layer.delta.bias, bias)
    nn.init.normal_(layer.delta.weight)
    return layer


def by_hand(layer, x):
    """One sequence (T, 3), with if and else: the last state, and at which steps it was updated."""
    lstm = isinstance(layer.cell, nn.LSTMCell)
    zero = x.new_zeros(1, 5)
    state, probability, step, updates = ((zero, zero) if lstm else zero), 1.0, None, []
    for t in range(len(x)):
        updates.append(probability > 0.5)
        if updates[-1]:
            state = layer.cell(x[t : t + 1], state)
            step = layer.delta(state[0] if lstm else state).sigmoid().item()
            probability = step
        else:
            probability = min(1.0, probability + step)
    return (state[0] if lstm else state)[0], updates


@pytest.mark.parametrize("cell", [nn.GRUCell(3, 5), nn.LSTMCell(3, 5), nn.RNNCell(3, 5)])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_recurrence_is_the_papers(cell, sparse):
    layer, xs = execute(skipping(cell).eval(), sparse=sparse), [torch.randn(n, 3).double() for n in (9, 1, 14, 2)]
    with torch.no_grad(), record(layer) as trace:
        answers = layer(pad(xs))
    keeps = torch.stack(trace[""], 1)[..., 0]
    for x, answer, keep in zip(xs, answers, keeps, strict=True):
        expected, updates = by_hand(layer, x)
        torch.testing.assert_close(answer, expected, rtol=1e-12, atol=1e-12)
        assert keep[: len(x)].bool().tolist() == updates and not keep[len(x) :].any()
    assert 0 < keeps[2].mean() < 1, "an example that does not skip proves nothing"


def test_padding_costs_nothing_and_changes_nothing():
    layer, xs = execute(skipping().eval(), sparse=True), [torch.randn(n, 3).double() for n in (4, 7)]
    cost = CostModel(layer, torch.randn(1, 7, 3).double())
    with torch.no_grad(), record(layer) as trace, forced(layer, everything), CountMacs() as count:
        together = layer(pad(xs))
    assert cost.spent(trace).tolist() == [4 / 7 * cost.full, cost.full]
    assert count.total == cost.spent(trace).sum()
    with torch.no_grad(), forced(layer, everything):
        torch.testing.assert_close(together[:1], layer(xs[0][None]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sparse", [False, True])
def test_every_step_is_answered(sparse):
    layer, x = execute(skipping(every_step=True).eval(), sparse=sparse), torch.randn(2, 6, 3).double()
    states = layer(Sequences(x, torch.tensor([6, 4])))
    for t in (1, 4, 6):
        torch.testing.assert_close(states[0, t - 1], by_hand(layer, x[0, :t])[0])
    assert torch.equal(states[1, 3], states[1, 5])


def test_steps_that_all_rows_skip_are_jumped_over():
    """The cell is asked at the updates alone; the trace hears of every step."""
    layer, x = execute(skipping(bias=-3.0).eval(), sparse=True), torch.randn(1, 40, 3).double()
    asked = []
    layer.cell.register_forward_pre_hook(lambda cell, given: asked.append(given[0]))
    with torch.no_grad(), record(layer) as trace:
        layer(x)
    updates = torch.stack(trace[""], 1)[0, :, 0].nonzero()[:, 0]
    assert len(trace[""]) == 40 and 2 <= len(updates) < 20
    assert torch.equal(torch.cat(asked), x[0, updates])


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("cell", [nn.GRUCell(3, 5), nn.LSTMCell(3, 5)])
def test_rows_do_not_wait_for_each_other(cell, every_step):
    """The sparse form asks the cell as often as the busiest row updates; answers and traces are those of the dense."""
    layer, xs = skipping(cell, every_step=every_step).eval(), [torch.randn(n, 3).double() for n in (30, 4, 17, 30, 1)]
    calls, traces, answers = [], [], []
    layer.cell.register_forward_pre_hook(lambda cell, given: calls.append(given[0].shape[0]))
    for sparse in (False, True):
        calls.clear()
        with torch.no_grad(), record(execute(layer, sparse=sparse)) as trace:
            answers.append(layer(pad(xs)))
        traces.append(trace)
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-12, atol=1e-12)
    keep = torch.stack(traces[1][""])
    assert torch.equal(keep, torch.stack(traces[0][""])) and len(calls) == keep.sum(0).max() < 30
    assert sum(calls) == keep.sum() and calls == sorted(calls, reverse=True) and calls[0] == 5
    for dense, sparse_ in zip(traces[0].calls, traces[1].calls, strict=True):
        assert torch.equal(dense.decision.score, sparse_.decision.score)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_cell_that_decides_is_heard_step_by_step(sparse):
    class Skipping(nn.Module):
        """A cell with a layer inside that some rows skip."""

        def __init__(self) -> None:
            super().__init__()
            self.read = nn.GRUCell(3, 5)
            self.more = LayerSkip(nn.Linear(5, 5), Gate(nn.Linear(5, 1), Threshold(0.0)))

        def forward(self, x, h):
            return self.more(self.read(x, h))

    layer, xs = skipping(Skipping()).eval(), [torch.randn(n, 3).double() for n in (9, 1, 14)]
    with torch.no_grad(), record(execute(layer, sparse=sparse)) as trace:
        answers = layer(pad(xs))
    for x, answer in zip(xs, answers, strict=True):
        torch.testing.assert_close(answer, by_hand(layer, x)[0], rtol=1e-12, atol=1e-12)
    inner = [call for call in trace.calls if call.name == "update.cell.more"]
    updates = [keep for keep in trace[""] if sparse is False or keep.any()]
    assert len(inner) == len(updates) and all((c.keep <= k).all() for c, k in zip(inner, updates, strict=True))


@pytest.mark.parametrize("cell", [nn.GRUCell(3, 5), nn.LSTMCell(3, 5), nn.RNNCell(3, 5)])
def test_a_session_runs_it(cell):
    layer, xs = skipping(cell).float().eval(), [torch.randn(n, 3) for n in (9, 3, 14, 2)]
    x = pad(xs)
    session = Session(layer, x, engines="eager")
    with torch.no_grad():
        torch.testing.assert_close(session(x), layer(x))
    assert bool(session.engines()) != layer.requires_grad_(False).runs_whole, "the update is a part, or all is one call"


def test_the_rounding_passes_gradients():
    """d(number of updates)/d(delta's bias): with the rounding's gradient taken to be 1, that of the probabilities."""
    layer, x = skipping().train(), torch.randn(3, 6, 3).double()
    with record(layer) as trace:
        layer(x)
    loss = UpdateCost()(None, None, trace)
    assert loss.item() == pytest.approx(torch.stack(trace[""], 1).sum().item() / 3)
    (gradient,) = torch.autograd.grad(loss, layer.delta.bias)
    assert gradient.item() > 0


def test_the_cost_makes_updates_rare():
    layer, x = skipping(bias=1.0).train(), torch.randn(8, 12, 3).double()
    optimizer = torch.optim.Adam(layer.delta.parameters(), 0.05)
    counts = []
    for _ in range(60):
        with record(layer) as trace:
            layer(x)
        loss = (0.1 * UpdateCost())(None, None, trace)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        counts.append(10 * loss.item())
    assert counts[0] == pytest.approx(12) and counts[-1] < 7


def test_one_step_and_no_row():
    layer, x = skipping().eval(), torch.randn(2, 1, 3).double()
    torch.testing.assert_close(layer(x), layer.cell(x[:, 0], x.new_zeros(2, 5)))
    assert layer(x[:0]).shape == (0, 5)


@pytest.mark.parametrize(
    "x, says",
    [
        (torch.zeros(2, 0, 3), "at least one step"),
        (torch.zeros(2, 4, 2), r"shape \(2, 4, 2\); expected \(batch, steps, 3\)"),
        (torch.zeros(4, 3), "expected"),
        (Sequences(torch.zeros(2, 4, 3), torch.tensor([0, 4])), "lengths from 0 to 4"),
        (Sequences(torch.zeros(2, 4, 3), torch.tensor([1, 5])), "lengths from 1 to 5"),
        (Sequences(torch.zeros(2, 4, 3), torch.tensor([4])), "one whole number each"),
        (Sequences(torch.zeros(2, 4, 3), torch.tensor([4.0, 4.0])), "one whole number each"),
    ],
)
def test_what_is_no_sequence(x, says):
    with pytest.raises(InputError, match=says):
        skipping().float()(x)


def test_nan_stays_in_its_row_and_a_session_refuses_it():
    layer, x = skipping().float().eval(), torch.randn(3, 6, 3)
    clean = layer(x)
    x[1, 2, 0] = torch.nan
    for sparse in (False, True):
        answer = execute(layer, sparse=sparse)(x)
        torch.testing.assert_close(answer[[0, 2]], clean[[0, 2]])
    session = Session(layer, torch.randn(3, 6, 3), engines="eager")
    with pytest.raises(InputError, match="NaN"):
        session(x)


def test_what_cannot_be_built_or_counted():
    with pytest.raises(ConfigError, match="hidden must be at least 1, got 0"):
        UpdateSkip(nn.GRUCell(3, 5), 3, 0)
    with record(other := nn.Linear(2, 2)) as trace:
        other(torch.zeros(1, 2))
    with pytest.raises(StructureError, match="model with UpdateSkip layers"):
        UpdateCost()(None, None, trace)
