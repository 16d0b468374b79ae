"""Frame exit: frames come from coarse to fine, features are pooled, and nothing is read once a gate is sure."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from dynanet import calibrate, train
from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.errors import ConfigError, InputError, StructureError
from dynanet.core.macs import CountMacs
from dynanet.data.ragged import Sequences
from dynanet.mechanisms.frame_exit import ExitGate, ExitLabels, FrameExit, coarse_to_fine, frames_read
from dynanet.session import Session

BACKBONE, CLASSIFIER = 16 * 6, 6 * 3
FIRST, LATER = 6 * 5 + 5 * 4 + 4, 2 * (6 * 5 + 5 * 4) + 8


def model_of(steps=4, longest=7, threshold=0.0):
    torch.manual_seed(3)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 6))
    gates = [ExitGate(6, widths=(5, 4), first=k == 0) for k in range(steps - 1)]
    model = FrameExit(backbone, [nn.Linear(6, 3) for _ in range(steps)], gates, longest=longest).double()
    for gate in gates:
        nn.init.normal_(gate.leave.weight, std=6.0)
    model.thresholds.fill_(threshold)
    return model


def videos(*lengths, frames=7):
    torch.manual_seed(len(lengths))
    return Sequences(torch.randn(len(lengths), frames, 1, 4, 4).double(), torch.tensor(lengths))


def by_hand(model, video):
    """One video (T, 1, 4, 4), with if and else: its answer, and how many frames were read."""
    pooled = None
    order = coarse_to_fine(len(video))[: model.steps]
    for k, t in enumerate(order):
        before, features = pooled, model.reader.backbone(video[t : t + 1])
        pooled = features if before is None else torch.maximum(before, features)
        logits = model.reader.classifiers[k](pooled)
        if k + 1 == len(order) or model.gates[k](pooled, before).item() >= model.thresholds[k]:
            return logits[0], k + 1
    raise AssertionError("a video has an end")


def test_frames_come_from_coarse_to_fine():
    assert coarse_to_fine(1) == [0] and coarse_to_fine(2) == [0, 1] and coarse_to_fine(3) == [1, 0, 2]
    assert coarse_to_fine(9) == [4, 0, 8, 2, 6, 1, 3, 5, 7]
    assert coarse_to_fine(10) == [4, 0, 9, 2, 6, 1, 3, 5, 7, 8]
    assert coarse_to_fine(1000, 5) == [499, 0, 999, 249, 749]
    for frames in range(1, 40):
        assert sorted(coarse_to_fine(frames)) == list(range(frames))


@pytest.mark.parametrize("sparse", [False, True])
def test_rows_leave_when_a_gate_is_sure_or_at_their_end(sparse):
    model, x = execute(model_of().eval(), sparse=sparse), videos(7, 1, 2, 7, 3, 4, 7, 5, 7, 6)
    cost = CostModel(model, Sequences(x.x[:1], x.lengths[:1]))
    with torch.no_grad(), record(model) as trace, CountMacs() as count:
        answers = model(x)
    read, spent = frames_read(trace), cost.spent(trace)
    for i, length in enumerate(x.lengths):
        expected, frames = by_hand(model, x.x[i, :length])
        torch.testing.assert_close(answers[i], expected, rtol=1e-12, atol=1e-12)
        assert read[i] == frames
        gates = FIRST + (min(frames, 3) - 1) * LATER
        assert spent[i].item() == frames * (BACKBONE + CLASSIFIER) + gates
    assert len(set(read.tolist())) > 2, "a dull example"
    if sparse:
        assert count.total == pytest.approx(spent.sum().item())


def test_of_a_video_that_has_ended_nothing_is_computed_whatever_is_forced():
    model, x = execute(model_of(threshold=torch.inf).eval(), sparse=True), videos(7, 1, 3)
    for keep in (None, everything):
        rows = []
        handle = model.reader.backbone.register_forward_hook(lambda m, args, y, rows=rows: rows.append(len(args[0])))
        with torch.no_grad(), record(model) as trace, forced(model, keep) if keep else torch.no_grad():
            model(x)
        handle.remove()
        assert rows == [3, 2, 2, 1] and frames_read(trace).tolist() == [4, 1, 3]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("batch, frames", [(0, 7), (1, 1), (1, 7), (64, 3)])
def test_any_batch_and_any_number_of_frames(sparse, batch, frames):
    model, x = execute(model_of().eval(), sparse=sparse), torch.randn(batch, frames, 1, 4, 4).double()
    with torch.no_grad():
        answers = model(x)
    assert answers.shape == (batch, 3)
    for i in range(min(batch, 5)):
        torch.testing.assert_close(answers[i], by_hand(model, x[i])[0], rtol=1e-12, atol=1e-12)


def test_calibration_finds_thresholds_for_budgets():
    model, x = model_of().eval(), videos(*[7, 5, 2, 7, 3] * 8)
    y = model(x).argmax(1).where(torch.rand(40) < 0.8, 0)
    cost = CostModel(model, Sequences(x.x[:1], x.lengths[:1]))
    frontier = calibrate.calibrate(model, [(x, y)], cost)
    budget = Budget(macs=0.6 * float(frontier.table.mean_macs[-1]))
    early = execute(frontier.at(budget), sparse=True)
    with torch.no_grad(), record(early) as trace:
        answers = early(x)
    choice, spent = frontier.choose(budget), cost.spent(trace).mean().item()
    assert spent == pytest.approx(choice.macs) and spent <= budget.macs
    assert (answers.argmax(1) == y).double().mean().item() == pytest.approx(choice.accuracy)


def test_a_session_is_the_eager_sparse_form():
    model, x = execute(model_of(steps=2).float().eval(), sparse=True), videos(7, 1, 2, 7, 3, 4, 7, 5)
    x = Sequences(x.x.float(), x.lengths)
    session = Session(model, x, engines="eager", batches=(4,))
    with torch.no_grad(), record(model) as trace:
        expected = model(x)
    with record(session) as ran:
        torch.testing.assert_close(session(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(frames_read(ran), frames_read(trace)) and len(session.engines()) == 1 + 2 + 1


def test_labels_of_gates_come_from_the_losses_of_the_exits():
    model, x, y = model_of().train(), videos(7, 1, 2, 7, 3), torch.tensor([0, 1, 2, 0, 1])
    with record(model) as trace:
        answer = model(x)
    losses, labels = [], []
    for t in (1, 2, 3):
        score, logits = _gate(trace, t - 1), trace.answers[""][t - 1]
        rows = x.lengths > t  # the others have ended, and nothing is to be decided
        leave = functional.cross_entropy(logits, y, reduction="none") <= 0.5 * math.exp(t / 2)
        labels += leave[rows].tolist()
        losses.append(functional.binary_cross_entropy_with_logits(score[rows], leave[rows].double()))
    assert set(labels) == {False, True}, "a dull example"
    loss = ExitLabels(0.5)(answer, y, trace)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    loss.backward()
    assert all(p.grad.any() for gate in model.gates for p in gate.leave.parameters())
    assert all(p.grad is None for p in model.reader.classifiers.parameters())


def _gate(trace, k):
    return [call.decision.score for call in trace.calls if call.name == ""][k][:, 0]


def test_gates_learn_after_which_frame_the_class_is_known():
    """The class is told by one frame: by the middle one, or (what the middle one tells) by the last."""
    torch.manual_seed(0)
    model = FrameExit(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.ReLU()), [nn.Linear(16, 2) for _ in range(4)],
        [ExitGate(16, widths=(16, 16), first=k == 0) for k in range(3)],
    )  # fmt: skip

    def draw(rows):
        y, late = torch.randint(2, (rows,)), torch.randint(2, (rows,))
        x = 0.1 * torch.randn(rows, 4, 1, 2, 2)
        told = torch.where(late > 0, 3, 1)  # the frames come as 1, 0, 3, 2
        x[torch.arange(rows), told, 0, 0, 0] += 2.0 * y - 1
        x[torch.arange(rows), told, 0, 0, 1] += 2.0
        return x, y, late

    objective = train.MultiExit() + ExitLabels(0.1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        x, y, _ = draw(64)
        with record(model.train()) as trace:
            answer = model(x)
        optimizer.zero_grad()
        objective(answer, y, trace).backward()
        optimizer.step()
    x, y, late = draw(200)
    with torch.no_grad(), record(execute(model.eval(), sparse=True)) as trace:
        right = (model(x).argmax(1) == y).float().mean()
    read = frames_read(trace)
    assert right > 0.95 and read[late == 0].mean() < 1.2 and 2.9 < read[late == 1].mean() < 3.5


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(StructureError, match="2 classifiers and 2 gates"):
        FrameExit(nn.Flatten(), [nn.Linear(6, 3)] * 2, [ExitGate(6)] * 2)
    with pytest.raises(ConfigError, match="longest must be at least 1, got 0"):
        FrameExit(nn.Flatten(), [nn.Linear(6, 3)], [], longest=0)
    model = model_of()
    with pytest.raises(InputError, match="8 frames for a layer made for 7"):
        model(torch.randn(2, 8, 1, 4, 4).double())
    for shape in ((2, 1, 4, 4), (2, 0, 1, 4, 4)):
        with pytest.raises(InputError, match="expected .batch, frames, C, H, W."):
            model(torch.randn(shape).double())
    with pytest.raises(InputError, match="lengths from 0 to 3"):
        model(videos(3, 0))
    with pytest.raises(ConfigError, match="beta is 0"):
        ExitLabels(0)
    with record(execute(model.eval(), sparse=True)) as trace:
        answer = model(videos(7, 1, 2, 7, 3))
    with pytest.raises(StructureError, match="use train mode"):
        ExitLabels(0.1)(answer, torch.zeros(5, dtype=torch.int64), trace)
    with pytest.raises(StructureError, match="is named 'body'"):
        ExitLabels(0.1, halt="body")(answer, torch.zeros(5, dtype=torch.int64), trace)
    with record(model) as trace, pytest.raises(StructureError, match="did not run"):
        frames_read(trace)
