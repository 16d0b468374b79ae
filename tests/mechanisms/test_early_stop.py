"""Early stop: who is sure stops, who has ended stops, and what is not read is not computed."""

import pytest
import torch
from torch import nn

from dynanet import calibrate, train
from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, record
from dynanet.core.errors import ConfigError, InputError, StructureError
from dynanet.core.macs import CountMacs
from dynanet.data.ragged import Sequences, pad
from dynanet.gates.confidence import LearnedGate, MaxProbability, PerExit
from dynanet.mechanisms.early_stop import Earliest, EarlyStop, steps_read
from dynanet.session import Session

CELL, HEAD = 3 * 5 * (3 + 5), 5 * 4


def stopper(kind=nn.GRUCell, longest=8, threshold=None, policy=None, **options):
    torch.manual_seed(2)
    model = EarlyStop(kind(3, 5), nn.Linear(5, 4), 3, 5, longest, policy=policy, **options).double()
    nn.init.normal_(model.frames.head.weight)
    if threshold is not None:
        model.thresholds.fill_(threshold)
    return model


def by_hand(model, x):
    """One sequence (T, 3), with if and else: its answer, and how many frames were read."""
    lstm = isinstance(model.frames.cell, nn.LSTMCell)
    zero = x.new_zeros(1, 5)
    state = (zero, zero) if lstm else zero
    for t in range(len(x)):
        state = model.frames.cell(x[t : t + 1], state)
        if (t + 1) % model.every == 0 or t + 1 == len(x):
            h = state[0] if lstm else state
            logits = model.frames.head(h)
            sure = model.confidence(logits) if model.policy is None else model.policy(h)
            if t + 1 == len(x) or sure.item() >= model.thresholds[t // model.every]:
                return logits[0], t + 1
    raise AssertionError("a sequence has an end")


@pytest.mark.parametrize("kind, every", [(nn.GRUCell, 1), (nn.LSTMCell, 1), (nn.GRUCell, 3)])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_rows_stop_when_they_are_sure_or_over(kind, every, learned, sparse):
    torch.manual_seed(5)
    policy = nn.Linear(5, 1) if learned else None
    if policy is not None:
        nn.init.normal_(policy.weight, std=4.0)
    model = execute(stopper(kind, every=every, policy=policy, threshold=0.5 if learned else -0.4).eval(), sparse=sparse)
    cell = (4 if kind is nn.LSTMCell else 3) * 5 * (3 + 5)
    xs = [torch.randn(n, 3).double() for n in (8, 1, 5, 2, 8, 7, 8, 8)]
    cost = CostModel(model, torch.randn(1, 8, 3).double())
    with torch.no_grad(), record(model) as trace, CountMacs() as count:
        answers = model(pad(xs))
    read, spent = steps_read(trace), cost.spent(trace)
    for i, x in enumerate(xs):
        expected, steps = by_hand(model, x)
        torch.testing.assert_close(answers[i], expected, rtol=1e-12, atol=1e-12)
        assert read[i] == steps
        answered = -(-steps // every)
        scored = min(answered, model.steps - 1) if learned else 0
        assert spent[i].item() == pytest.approx(steps * cell + answered * HEAD + scored * 5)
    assert (read < torch.tensor([len(x) for x in xs])).any() and (read > every).any(), "a dull example"
    if sparse:
        assert count.total == pytest.approx(spent.sum().item())


def test_a_new_model_reads_to_the_end_of_every_sequence():
    model = execute(stopper().eval(), sparse=True)
    with record(model) as trace:
        model(Sequences(torch.randn(3, 8, 3).double(), torch.tensor([8, 1, 6])))
        assert steps_read(trace).tolist() == [8, 1, 6]
    with record(model) as trace:
        assert model(torch.randn(2, 3, 3).double()).shape == (2, 4)  # shorter than the longest
    assert steps_read(trace).tolist() == [3, 3]


def test_calibration_finds_thresholds_for_budgets():
    """Through the same door as early exits: prices per sample, as sequences end when they do."""
    model = stopper(longest=6).eval()
    x = Sequences(torch.randn(60, 6, 3).double(), torch.randint(1, 7, (60,)))
    y = model(x).argmax(1)  # so that the last answers are right
    cost = CostModel(model, Sequences(x.x[:1], x.lengths[:1].fill_(6)))
    frontier = calibrate.calibrate(model, [(x, y)], cost)
    whole = x.lengths.double() * (CELL + HEAD)
    torch.testing.assert_close(torch.from_numpy(frontier.table.macs[:, -1]), whole, rtol=1e-9, atol=0)
    budget = Budget(macs=0.6 * whole.mean().item())
    choice = frontier.choose(budget)
    early = execute(frontier.at(budget), sparse=True)
    with torch.no_grad(), record(early) as trace:
        answers = early(x)
    spent = cost.spent(trace).mean().item()
    assert spent == pytest.approx(choice.macs) and spent <= budget.macs
    assert (answers.argmax(1) == y).double().mean().item() == pytest.approx(choice.accuracy)
    assert (steps_read(trace) < x.lengths).any()


def test_training_by_confidence_hears_every_step_of_every_row():
    model, x = stopper(threshold=-9.0).train(), Sequences(torch.randn(3, 8, 3).double(), torch.tensor([8, 3, 1]))
    with record(model) as trace:
        answer = model(x)
    loss = train.MultiExit()(answer, torch.tensor([0, 1, 2]), trace)
    steps = torch.stack(trace.answers[""])
    assert steps.shape == (8, 3, 4) and torch.equal(steps[2, 1], steps[7, 1]) and not torch.equal(steps[1], steps[2])
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_policy_learns_when_an_answer_is_right():
    """The class is told at frame 3. Stopping before it is guessing, stopping long after it costs earliness."""
    torch.manual_seed(0)
    model = EarlyStop(nn.GRUCell(3, 16), nn.Linear(16, 2), 3, 16, 8, policy=nn.Linear(16, 1))
    nn.init.constant_(model.policy.bias, -2.0)

    def draw(rows):
        y = torch.randint(2, (rows,))
        x = 0.1 * torch.randn(rows, 8, 3)
        x[:, 3, 0] += 2.0 * y - 1
        x[:, 3, 1] += 1.0
        return x, y

    objective = train.CrossEntropy() + Earliest(0.02)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        x, y = draw(64)
        with record(model.train()) as trace:
            answer = model(x)
        optimizer.zero_grad()
        objective(answer, y, trace).backward()
        optimizer.step()
    x, y = draw(200)
    with torch.no_grad(), record(execute(model.eval(), sparse=True)) as trace:
        right = (model(x).argmax(1) == y).float().mean()
    assert right > 0.95 and 4 <= steps_read(trace).mean() < 7
    with record(model.eval()) as trace:
        assert Earliest(0.02)(model(x), y, trace) == 0


def test_the_policy_gradient_is_that_of_the_log_probability():
    model, lengths = stopper(policy=nn.Linear(5, 1)).train(), torch.tensor([8, 2, 1, 5])
    x, y = torch.randn(4, 8, 3).double(), torch.tensor([0, 1, 2, 3])
    with record(model) as trace:
        answer = model(Sequences(x, lengths))
    read = steps_read(trace).long()
    with torch.no_grad():
        reward = torch.where(answer.argmax(1) == y, 1.0, -1.0).double()
    advantage = (reward - reward.mean()) * 4 / 3
    expected = 0
    for i in range(4):
        h = x.new_zeros(1, 5)
        for t in range(min(int(read[i]), int(lengths[i]) - 1)):
            h = model.frames.cell(x[i, t : t + 1], h)
            p = model.policy(h).sigmoid()
            drawn = p if t + 1 == read[i] else 1 - p
            expected = expected - (drawn.log() * advantage[i] + 0.3 * p.log()) / 4
    torch.testing.assert_close(Earliest(0.3)(answer, y, trace), expected.squeeze())


def test_what_it_refuses():
    model = stopper().float().eval()
    for x, says in (
        (torch.zeros(2, 9, 3), "9 frames for a layer made for 8"),
        (torch.zeros(2, 0, 3), "at least one step"),
        (Sequences(torch.zeros(2, 4, 3), torch.tensor([4, 0])), "lengths from 0 to 4"),
    ):
        with pytest.raises(InputError, match=says):
            model(x)
    with pytest.raises(ConfigError, match="at least 1"):
        stopper(every=0)
    with pytest.raises(ConfigError, match="a confidence and a policy"):
        stopper(policy=nn.Linear(5, 1), confidence=MaxProbability())
    with pytest.raises(ConfigError, match="earliness is -1"):
        Earliest(-1)
    with pytest.raises(StructureError, match="one per exit but the last"):
        stopper(confidence=PerExit([LearnedGate()]))
    with record(model) as trace:
        answer = model(torch.zeros(2, 4, 3))
    with pytest.raises(StructureError, match="use train.MultiExit"):
        Earliest(0.1)(answer, torch.tensor([0, 1]), trace)
    with pytest.raises(StructureError, match="is named 'nobody'"):
        steps_read(trace, "nobody")


def test_nan_stays_in_its_row_and_a_session_refuses_it():
    model, x = stopper(threshold=-0.4).float().eval(), torch.randn(3, 6, 3)
    clean = model(x)
    x[1, 2, 0] = torch.nan
    for sparse in (False, True):
        torch.testing.assert_close(execute(model, sparse=sparse)(x)[[0, 2]], clean[[0, 2]])
    session = Session(model, torch.randn(3, 6, 3), engines="eager")
    with pytest.raises(InputError, match="NaN"):
        session(x)


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
def test_a_session_streams_sequences(kind):
    model, xs = stopper(kind, threshold=-0.4).float().eval(), torch.randn(12, 8, 3)
    session = Session(model, xs, engines="eager")
    answers = list(session.stream(iter(xs)))
    torch.testing.assert_close(torch.stack(answers), model(xs))
