"""LSTM-Jump: rows read, jump and end as the paper says, and what they jump over is neither computed nor looked at."""

import pytest
import torch
from torch import nn

from dynanet import train
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError, InputError, StructureError
from dynanet.core.macs import CountMacs
from dynanet.data.ragged import Sequences, pad
from dynanet.mechanisms.jump import Jump, ReinforceJumps
from dynanet.session import Session
from dynanet.train.collapse import loads


def jumping(kind=nn.GRUCell, read=2, reach=4, jumps=3):
    torch.manual_seed(6)
    layer = Jump(kind(3, 5), 3, 5, read=read, reach=reach, jumps=jumps).double()
    nn.init.normal_(layer.gate.scorer.weight, std=3.0)
    return layer


def always(layer, jump):
    """The same jump every time."""
    nn.init.zeros_(layer.gate.scorer.weight)
    with torch.no_grad():
        layer.gate.scorer.bias.copy_(100 * torch.eye(layer.reach + 1)[jump])
    return layer


def by_hand(layer, x):
    """One sequence (T, 3), with while and if: the last state, what was read, and after which steps it chose."""
    lstm = isinstance(layer.cell, nn.LSTMCell)
    zero = x.new_zeros(1, 5)
    state, at, reads, choices = ((zero, zero) if lstm else zero), 0, [], []
    while True:
        for t in range(at, min(at + layer.read, len(x))):
            state = layer.cell(x[t : t + 1], state)
            reads.append(t)
        if reads[-1] - at + 1 < layer.read or reads[-1] + 1 == len(x) or len(choices) == layer.jumps:
            break
        choices.append(reads[-1])
        jump = layer.gate.scorer(state[0] if lstm else state).argmax().item()
        at = reads[-1] + jump
        if jump == 0 or at >= len(x):
            break
    return (state[0] if lstm else state)[0], reads, choices


def steps_kept(trace):
    """By unit: the steps at which every row kept it."""
    keeps = torch.stack(trace[""], 1)
    return [[row.nonzero()[:, 0].tolist() for row in unit] for unit in keeps.unbind(2)]


@pytest.mark.parametrize("kind, read", [(nn.GRUCell, 1), (nn.LSTMCell, 1), (nn.LSTMCell, 2), (nn.RNNCell, 3)])
@pytest.mark.parametrize("sparse", [False, True])
def test_rows_read_and_jump_as_the_paper_says(kind, read, sparse):
    layer = execute(jumping(kind, read).eval(), sparse=sparse)
    xs = [torch.randn(n, 3).double() for n in (14, 1, 9, 3, 14, 14, 2, 11)]
    with torch.no_grad(), record(layer) as trace:
        answers = layer(pad(xs))
    expected = [by_hand(layer, x) for x in xs]
    torch.testing.assert_close(answers, torch.stack([e[0] for e in expected]), rtol=1e-12, atol=1e-12)
    assert steps_kept(trace) == [[e[1] for e in expected], [e[2] for e in expected]]
    assert len({tuple(e[1]) for e in expected if len(e[1]) > 3}) > 1, "rows that jump alike prove nothing"


@pytest.mark.parametrize(
    "jump, jumps, reads",
    [
        (0, 5, [0, 1]),  # stops
        (1, 2, [0, 1, 2, 3, 4, 5]),  # on to the next step, and to the end of its jumps
        (3, 2, [0, 1, 4, 5, 8, 9]),
        (3, 9, [0, 1, 4, 5, 8, 9]),  # the end of the sequence
        (4, 9, [0, 1, 5, 6, 10]),  # in the middle of reading
    ],
)
def test_how_rows_end(jump, jumps, reads):
    layer = always(jumping(jumps=jumps), jump).eval()
    with record(layer) as trace:
        layer(torch.randn(1, 11, 3).double())
    assert steps_kept(trace)[0] == [reads]


@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_jumped_over_is_not_looked_at(sparse):
    """NaN in the steps that no row reads and behind the ends changes nothing."""
    layer, x = execute(jumping().eval(), sparse=sparse), torch.randn(6, 20, 3).double()
    lengths = torch.tensor([20, 20, 9, 13, 20, 4])
    with torch.no_grad(), record(layer) as trace:
        answer = layer(Sequences(x, lengths))
        unread = torch.stack(trace[""], 1)[..., :1] == 0
        torch.testing.assert_close(layer(Sequences(x.masked_fill(unread, torch.nan), lengths)), answer)
    assert unread.float().mean() > 0.4


def test_the_cell_is_called_as_often_as_the_longest_reader_reads():
    layer, x = execute(jumping(read=1).eval(), sparse=True), torch.randn(8, 60, 3).double()
    asked = []
    layer.cell.register_forward_pre_hook(lambda cell, given: asked.append(len(given[0])))
    cost = CostModel(layer, x[:1])
    asked.clear()
    with torch.no_grad(), record(layer) as trace, CountMacs() as count:
        layer(x)
    reads, choices = torch.stack(trace[""], 1).sum(1).unbind(1)
    assert len(trace[""]) == 60 and len(asked) == reads.max() <= 4
    assert sum(asked) == reads.sum() < 8 * len(asked), "rows that stopped are gone"
    assert count.total == cost.spent(trace).sum() == (reads * 3 * 5 * (3 + 5) + choices * 5 * 5).sum()


def test_padding_costs_nothing_and_long_sequences_cost_what_is_read():
    layer = always(execute(jumping(reach=200, jumps=2).eval(), sparse=True), 200)
    cost = CostModel(layer, torch.randn(1, 8, 3).double())  # prices are of steps, so any length will do
    assert cost.always == 0
    cell, choice = cost.unit[""].tolist()
    with record(layer) as trace:
        layer(Sequences(torch.zeros(3, 500, 3).double(), torch.tensor([500, 3, 2])))
    assert cost.spent(trace).tolist() == [6 * cell + 2 * choice, 2 * cell + choice, 2 * cell]
    with CountMacs() as count:
        layer(torch.zeros(1, 100_000, 3).double())
    assert count.total == 6 * cell + 2 * choice


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_replay_decides_and_answers_the_same(mode):
    """What was drawn in training too: step by step instead of jump by jump."""
    layer, x = jumping(read=1).train(mode == "train"), Sequences(torch.randn(5, 9, 3).double(), torch.arange(5) * 2 + 1)
    with torch.no_grad(), record(layer) as first:
        answer = layer(x)
    keeps = iter(first[""])
    with torch.no_grad(), record(layer.eval()) as second, forced(layer, lambda decision: next(keeps)):
        torch.testing.assert_close(layer(x), answer, rtol=1e-12, atol=1e-12)
    for a, b in zip(first[""], second[""], strict=True):
        assert torch.equal(a, b)
    with torch.no_grad(), record(layer) as own:
        layer(x)
    with torch.no_grad(), record(layer) as stepped, forced(layer, lambda decision: decision.keep):
        layer(x)
    for a, b in zip(own.calls, stepped.calls, strict=True):
        assert torch.equal(a.keep, b.keep) and torch.equal(a.decision.score, b.decision.score)


def test_more_may_be_read_than_in_training():
    layer, x = always(jumping(read=1, jumps=1), 2).eval(), torch.randn(1, 11, 3).double()
    layer.read, layer.jumps = 3, 2
    with record(layer) as trace:
        layer(x)
    assert steps_kept(trace) == [[[0, 1, 2, 4, 5, 6, 8, 9, 10]], [[2, 6]]]
    layer.jumps = 0
    with pytest.raises(ConfigError, match="jumps must be at least 1, got 0"):
        layer(x)


def test_the_loss_is_the_papers():
    """By hand, along what each row drew: -log p of its jumps times the advantage, and the baseline's squared error."""
    layer, lengths = jumping(nn.LSTMCell, read=1).train(), torch.tensor([9, 2, 1, 6])
    x, y = torch.randn(4, 9, 3).double(), torch.tensor([0, 1, 2, 3])
    with record(layer) as trace:
        answer = layer(Sequences(x, lengths))
    reads, choices = steps_kept(trace)
    expected, entropies = 0, []
    for i in range(4):
        state = (x.new_zeros(1, 5), x.new_zeros(1, 5))
        reward = (1.0 if answer[i].argmax() == y[i] else -1.0) - 0.1 * len(reads[i])
        for number, t in enumerate(reads[i]):
            state = layer.cell(x[i, t : t + 1], state)
            if t not in choices[i]:
                continue
            log_p = layer.gate.scorer(state[0]).log_softmax(1)[0]
            entropies.append(-(log_p.exp() * log_p).sum())
            value = layer.baseline(state[0].detach()).squeeze()
            # Jumps beyond the end, and stops, cannot be told from what was read: any of them may have been drawn.
            drawn = [reads[i][number + 1] - t] if number + 1 < len(reads[i]) else ended(trace, i, number)
            expected = expected + ((reward - value) ** 2 - log_p[drawn[0]] * (reward - value).detach()) / 4
    expected = expected - 0.2 * torch.stack(entropies).mean()
    loss = ReinforceJumps(0.1, entropy=0.2)(answer, y, trace)
    torch.testing.assert_close(loss, expected)
    parameters = [*layer.cell.parameters(), *layer.gate.parameters(), *layer.baseline.parameters()]
    gradients = [torch.autograd.grad(value, parameters, retain_graph=True) for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    assert choices[2] == [] and any(len(c) > 1 for c in choices), "a dull example"


def ended(trace, row, number):
    """The last jump of a row, which led out of its sequence."""
    jumps = trace.answers[""][number]
    assert jumps.chooses[row]
    return jumps.keep[row].nonzero()[:, 0].tolist()


def test_jumps_learn_where_the_answer_is():
    """The first step says at which of the others the class is told (the paper's section 4.1)."""
    torch.manual_seed(0)
    steps, classes = 6, 4
    model = nn.Sequential(
        Jump(nn.LSTMCell(steps + classes, 32), steps + classes, 32, read=1, reach=steps - 1, jumps=1),
        nn.Linear(32, classes),
    )

    def draw(rows):
        numbers, place = torch.randint(classes, (rows, steps)), torch.randint(1, steps, (rows,))
        x = nn.functional.one_hot(numbers + steps, steps + classes).float()
        x[:, 0] = nn.functional.one_hot(place, steps + classes)
        return x, numbers[torch.arange(rows), place]

    objective = train.CrossEntropy() + ReinforceJumps()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        x, y = draw(64)
        with record(model.train()) as trace:
            answer = model(x)
        optimizer.zero_grad()
        objective(answer, y, trace).backward()
        optimizer.step()
    x, y = draw(400)
    with torch.no_grad(), record(execute(model.eval(), sparse=True)) as trace:
        answer = model(x)
    assert (answer.argmax(1) == y).float().mean() > 0.98
    reads = torch.stack(trace["0"], 1)[..., 0]
    assert torch.equal(reads[:, 1:], x[:, 0, 1:steps]), "the first step, and the one it points to"
    assert ReinforceJumps()(answer, y, trace) == 0, "in eval mode nothing is drawn"


def test_reading_has_a_price():
    """Where reading is dear and nothing is to be learnt from it, rows stop."""
    torch.manual_seed(1)
    layer = Jump(nn.GRUCell(3, 8), 3, 8, read=1, reach=4, jumps=5)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    x, y = torch.randn(64, 8, 3), torch.zeros(64, dtype=torch.int64)
    for _ in range(60):
        with record(layer.train()) as trace:
            answer = layer(x)
        optimizer.zero_grad()
        ReinforceJumps(1.0)(answer, y, trace).backward()
        optimizer.step()
    with torch.no_grad(), record(layer.eval()) as trace:
        layer(x)
    assert torch.stack(trace[""], 1)[..., 0].sum(1).mean() < 1.2


def test_few_reads_are_no_collapse():
    layer = always(jumping(read=1, jumps=1), 4).train()
    with record(layer) as trace:
        layer(torch.randn(4, 300, 3).double())
    assert loads(trace) == {}


def test_one_step_and_no_row():
    layer, x = jumping().eval(), torch.randn(2, 1, 3).double()
    torch.testing.assert_close(layer(x), layer.cell(x[:, 0], x.new_zeros(2, 5)))
    for sparse in (False, True):
        with record(execute(layer, sparse=sparse)) as trace:
            assert layer(torch.zeros(0, 7, 3).double()).shape == (0, 5)
        assert [keep.shape for keep in trace[""]] == [(0, 2)] * 7
    with record(layer.train()) as trace:
        answer = layer(x)
    assert ReinforceJumps()(answer, torch.tensor([0, 1]), trace) == 0, "nothing to choose"


def test_nan_stays_in_its_row_and_a_session_refuses_it():
    layer, x = jumping().float().eval(), torch.randn(3, 9, 3)
    clean = layer(x)
    x[1, 0] = torch.nan
    for sparse in (False, True):
        torch.testing.assert_close(execute(layer, sparse=sparse)(x)[[0, 2]], clean[[0, 2]])
    with pytest.raises(InputError, match="NaN"):
        Session(layer, torch.randn(3, 9, 3), engines="eager")(x)


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
def test_a_session_answers_as_the_model(kind):
    layer, x = jumping(kind).float().eval(), torch.randn(6, 12, 3)
    torch.testing.assert_close(Session(layer, x, engines="eager")(x), layer(x))


@pytest.mark.parametrize("size", ["inputs", "hidden", "read", "reach", "jumps"])
@pytest.mark.parametrize("wrong", [0, -1, 1.5])
def test_sizes_are_at_least_1(size, wrong):
    sizes = {"inputs": 3, "hidden": 5, "read": 1, "reach": 1, "jumps": 1, size: wrong}
    with pytest.raises(ConfigError, match=rf"^{size} must be .*at least 1, got {wrong}$"):
        Jump(nn.GRUCell(3, 5), **sizes)


def test_it_says_what_no_weight_tells():
    """So that a checkpoint is not read with other bounds by mistake."""
    said = {jumping(**bounds).decides for bounds in ({}, {"read": 3}, {"jumps": 1})}
    assert len(said) == 3 and jumping(reach=2).decides in said


@pytest.mark.parametrize(
    "x, says",
    [
        (torch.zeros(2, 0, 3), "at least one step"),
        (torch.zeros(2, 4, 2), r"shape \(2, 4, 2\); expected \(batch, steps, 3\)"),
        (Sequences(torch.zeros(2, 4, 3), torch.tensor([0, 4])), "lengths from 0 to 4"),
        (Sequences(torch.zeros(2, 4, 3), torch.tensor([1, 5])), "lengths from 1 to 5"),
    ],
)
def test_what_is_no_sequence(x, says):
    with pytest.raises(InputError, match=says):
        jumping().float()(x)


def test_what_cannot_be_trained():
    for settings in ({"reading": -0.1}, {"entropy": -1.0}, {"reading": float("nan")}):
        with pytest.raises(ConfigError, match="give 0 or more"):
            ReinforceJumps(**settings)
    with record(other := nn.Linear(2, 2)) as trace:
        other(torch.zeros(1, 2))
    with pytest.raises(StructureError, match="model with Jump layers"):
        ReinforceJumps()(torch.zeros(1, 2), torch.zeros(1), trace)
    with record(layer := jumping().train()) as trace:
        layer(torch.randn(6, 8, 3).double())
    with pytest.raises(StructureError, match=r"\[6\] rows in a batch of 3"):
        ReinforceJumps()(torch.zeros(3, 5), torch.zeros(3), trace)
    layer = Jump(nn.GRUCell(3, 5), 3, 5, read=1, reach=4, jumps=1, scorer=nn.Linear(5, 4))
    with pytest.raises(StructureError, match="the last axis must be 5"):
        layer(torch.zeros(2, 4, 3))
