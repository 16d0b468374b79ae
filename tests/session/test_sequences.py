"""Frames that arrive one by one, of many sequences at once: the answers and frames read are those of the batch call."""

import random

import pytest
import torch
from torch import nn

from dynanet.core.dynamic import Dynamic, execute, record
from dynanet.core.errors import InputError
from dynanet.data.ragged import pad
from dynanet.gates.confidence import Confidence, LearnedGate, LearnedScore, Margin, Patience, PerExit
from dynanet.mechanisms.early_stop import EarlyStop, steps_read
from dynanet.session import EndOfSequence, SequenceAnswer, SequenceFrame, Session

LONGEST = 9


def stopper(kind: type = nn.GRUCell, threshold: float = -0.2, steps: int | None = None, **options) -> EarlyStop:
    torch.manual_seed(3)
    model = EarlyStop(kind(3, 5), nn.Linear(5, 4), 3, 5, LONGEST, **options)
    nn.init.normal_(model.frames.head.weight)
    if model.policy is not None:
        nn.init.normal_(model.policy.weight, std=3.0)
    model.limit = steps
    model.thresholds += torch.rand(model.thresholds.shape) * 0.3  # another one at every step
    model.thresholds.clamp_(max=threshold) if model.thresholds.isinf().all() else None
    return model.double().eval()


def mixed() -> Confidence:
    """Criteria that remember different things, at every exit another one."""
    torch.manual_seed(4)
    exits = [Margin(), LearnedGate(), LearnedScore(4), LearnedScore(4), Margin(), Patience(), Patience(), Margin()]
    return PerExit(exits)


MODELS = {
    "confidence": lambda: stopper(),
    "nobody is sure": lambda: stopper(threshold=99.0),
    "LSTM, every third frame": lambda: stopper(nn.LSTMCell, every=3),
    "every second frame, which does not divide the longest": lambda: stopper(every=2, threshold=1.5),
    "patience": lambda: stopper(confidence=Patience(), threshold=2.0),
    "other criteria at every step": lambda: stopper(confidence=mixed(), threshold=0.4),
    "policy": lambda: stopper(policy=nn.Linear(5, 1)),
    "a hard cap": lambda: stopper(threshold=99.0, steps=4),
    "one step": lambda: stopper(every=LONGEST),
}
LENGTHS = (9, 1, 5, 2, 9, 7, 3, 9, 4, 6, 9, 8, 9)


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """A session, sequences, and what the batch call says of each: (answer, frames read)."""
    model = MODELS[request.param]()
    torch.manual_seed(5)
    xs = {f"s{i}": torch.randn(n, 3).double() for i, n in enumerate(LENGTHS)}
    with torch.no_grad(), record(execute(model, sparse=True)) as trace:
        answers = model(pad(list(xs.values())))
    expected = {name: (a, int(n)) for name, a, n in zip(xs, answers, steps_read(trace), strict=True)}
    return Session(model, torch.zeros(1, LONGEST, 3).double(), engines="eager"), xs, expected


def arrivals(xs: dict, seed: int) -> list:
    """Frames of the sequences, shuffled; those of one sequence in their order, then its end."""
    draw, left = (
        random.Random(seed),
        {name: [SequenceFrame(name, f) for f in x] + [EndOfSequence(name)] for name, x in xs.items()},
    )
    order = [name for name, items in left.items() for _ in items]
    if seed:
        draw.shuffle(order)
    return [left[name].pop(0) for name in order]


def same(answered: list[SequenceAnswer], expected: dict) -> None:
    assert sorted(a.sequence for a in answered) == sorted(expected)
    for each in answered:
        answer, frames = expected[each.sequence]
        torch.testing.assert_close(each.answer, answer, rtol=1e-10, atol=1e-10)
        assert each.frames == frames


@pytest.mark.parametrize("seed, batch", [(0, 1), (0, 64), (1, 1), (1, 3), (2, 64), (3, 4)])
def test_the_batch_calls_answers_and_frames(case, seed, batch):
    session, xs, expected = case
    answered = list(session.stream(arrivals(xs, seed), batch=batch))
    same(answered, expected)
    assert not any(a.confidence != a.confidence for a in answered)


def test_in_step_whole_batches_run_together(case):
    """Frames that come in turn make one call of the cell per turn, for all that are still open."""
    session, xs, expected = case
    turns = [SequenceFrame(name, xs[name][t]) for t in range(LONGEST) for name in xs if t < len(xs[name])]
    with cell_calls(session) as rows:
        same(list(session.stream(turns, batch=64)), expected)
    assert sum(rows) >= sum(frames for _, frames in expected.values())
    assert len(rows) <= 2 * LONGEST + len(xs) and max(rows) >= 5


class cell_calls:
    """Rows of every call of the cell."""

    def __init__(self, session: Session) -> None:
        self.engine = session.model.get_submodule("frames.cell").engine

    def __enter__(self) -> list[int]:
        rows: list[int] = []
        self.engine.listener = lambda inputs: rows.append(inputs[0].shape[0])
        return rows

    def __exit__(self, *_) -> None:
        self.engine.listener = None


def test_late_frames_cost_nothing_and_are_not_even_looked_at(case):
    session, xs, expected = case
    serving = session.sequences(batch=1)
    with cell_calls(session) as rows:
        answered = [a for name, x in xs.items() for frame in x for a in serving.read(name, frame)]
        assert sum(rows) == sum(expected[name][1] for name in xs)  # what was read, and nothing else
        rows.clear()
        done = [a.sequence for a in answered]
        assert done
        for name in done:
            assert serving.read(name, torch.full((3,), torch.nan)) == serving.read(name, "no frame") == []
            assert serving.end(name) == []
        assert rows == []
    same([*answered, *serving.end_all()], expected)


def test_an_engine_may_read():
    model, xs = stopper(nn.LSTMCell).float(), torch.randn(5, LONGEST, 3)
    with torch.no_grad(), record(execute(model, sparse=True)) as trace:
        answers = model(xs)
    each = Session(model, xs, engines="onnxruntime", batches=(4,))
    answered = list(each.stream([SequenceFrame(i, xs[i, t]) for t in range(LONGEST) for i in range(5)], batch=3))
    assert sorted((a.sequence, a.frames) for a in answered) == list(enumerate(steps_read(trace).int().tolist()))
    for a in answered:
        torch.testing.assert_close(a.answer, answers[a.sequence], rtol=1e-3, atol=1e-3)


class Looking(nn.Module):
    """A cell that looks at an image first: frames of a video, flat."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.remember = nn.Conv2d(2, 4, 3), nn.GRUCell(4, 5)

    def forward(self, frame: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return self.remember(self.look(frame.unflatten(1, (2, 4, 4))).relu().mean((2, 3)), state)


def test_video_frames_are_served_as_they_come():
    torch.manual_seed(8)
    model = EarlyStop(Looking(), nn.Linear(5, 4), 2 * 4 * 4, 5, LONGEST).eval()
    nn.init.normal_(model.frames.head.weight)
    nn.init.normal_(model.frames.cell.look.weight)
    model.thresholds.copy_(torch.linspace(0.5, -1.0, LONGEST - 1))
    videos = torch.randn(6, LONGEST, 2, 4, 4)
    with torch.no_grad(), record(execute(model, sparse=True)) as trace:
        answers = model(videos.flatten(2))
    read = steps_read(trace).int().tolist()
    assert 1 < len(set(read)), "a dull example"
    serving = Session(model, videos[:1].flatten(2), engines="eager")
    arrivals = [SequenceFrame(i, videos[i, t].flatten()) for t in range(LONGEST) for i in range(6)]
    answered = {a.sequence: a for a in serving.stream(arrivals, batch=4)}
    assert [answered[i].frames for i in range(6)] == read
    torch.testing.assert_close(torch.stack([answered[i].answer for i in range(6)]), answers)


def session(**options) -> Session:
    return Session(stopper(threshold=99.0, **options), torch.zeros(1, LONGEST, 3).double(), engines="eager")


def test_an_answer_comes_as_soon_as_the_rule_allows():
    """Batch 1: with the frame that settles it. Larger: at the latest with the sequence's next frame."""
    model = stopper()
    serving = Session(model, torch.zeros(1, LONGEST, 3).double(), engines="eager")
    torch.manual_seed(6)
    x = torch.randn(LONGEST, 3).double()
    with record(model) as trace, torch.no_grad():
        model(x[None])
    read = int(steps_read(trace))
    assert 1 <= read < LONGEST, "a dull example"
    at_once, late = serving.sequences(batch=1), serving.sequences(batch=64)
    late.read("waits for nobody", x[0] * 0)
    ready = [(bool(at_once.read("a", x[t])), [a.sequence for a in late.read("a", x[t])]) for t in range(read + 1)]
    assert [a for a, _ in ready] == [t == read - 1 for t in range(read + 1)]
    assert next(t for t, (_, names) in enumerate(ready) if "a" in names) in (read - 1, read)


def test_the_confidence_is_the_score_that_let_go():
    model = stopper()
    session = Session(model, torch.zeros(1, LONGEST, 3).double(), engines="eager")
    torch.manual_seed(7)
    for x in torch.randn(20, LONGEST, 3).double():
        (answered,) = session.stream([SequenceFrame(0, frame) for frame in x])
        assert answered.confidence == pytest.approx(model.confidence(answered.answer[None]).item())
        if answered.frames < LONGEST:
            assert answered.confidence >= model.thresholds[answered.frames - 1]


def test_a_name_may_begin_again_after_its_end():
    serving, x = session().sequences(batch=1), torch.randn(2, 4, 3).double()
    answers = []
    for sequence in x:
        for frame in sequence:
            assert serving.read("a", frame) == []
        answers += serving.end("a")
    with torch.no_grad():
        torch.testing.assert_close(torch.stack([a.answer for a in answers]), stopper(threshold=99.0)(x))
    assert [a.frames for a in answers] == [4, 4]


def test_more_sequences_than_there_were_places():
    x = torch.randn(50, 2, 3).double()
    frames = [SequenceFrame(i, x[i, t]) for t in range(2) for i in range(50)]
    answered = list(session().stream(frames, batch=7))
    with torch.no_grad():
        expected = stopper(threshold=99.0)(x)
    assert sorted(a.sequence for a in answered) == list(range(50))
    for a in answered:
        torch.testing.assert_close(a.answer, expected[a.sequence])


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda t: t.index_fill(0, torch.tensor([0]), torch.nan), "NaN"),
        (lambda t: t / 0, "NaN or infinite"),
        (lambda t: t[:-1], "2 channels instead of 3"),
        (lambda t: t[None], "3 axes instead of 2"),
        (lambda t: t.float(), "float32; expected torch.float64"),
        (lambda t: t.tolist(), "the input is list"),
    ],
)
def test_a_frame_that_is_refused_changes_nothing(spoil, says):
    serving, x = session().sequences(batch=2), torch.randn(4, 3).double()
    for t, frame in enumerate(x):
        with pytest.raises(InputError, match=f"frame {t} of sequence 'a': .*{says}"):
            serving.read("a", spoil(frame))
        serving.read("a", frame)
    (answered,) = serving.end("a")
    with torch.no_grad():
        torch.testing.assert_close(answered.answer, stopper(threshold=99.0)(x[None])[0])


def test_what_a_stream_of_frames_refuses():
    each, frame = session(), torch.zeros(3).double()
    with pytest.raises(InputError, match="the end of sequence 'b', of which nothing was read"):
        list(each.stream([SequenceFrame("a", frame), EndOfSequence("b")]))
    with pytest.raises(InputError, match="item 1 of the stream is Tensor; expected SequenceFrame or EndOfSequence"):
        list(each.stream([SequenceFrame("a", frame), frame]))
    with pytest.raises(InputError, match="frame 1 of sequence 'a'"):
        list(each.stream([SequenceFrame("a", frame), SequenceFrame("a", frame[:2])]))
    with pytest.raises(InputError, match="sample 1 of the stream"):
        list(each.stream([torch.zeros(LONGEST, 3).double(), SequenceFrame("a", frame)]))
    with pytest.raises(InputError, match="batch is 0"):
        each.sequences(batch=0)


def test_only_models_that_read_frame_by_frame():
    each = Session(Skipping(), torch.zeros(1, 3), engines="eager")
    with pytest.raises(InputError, match="read frame by frame, as EarlyStop does; Skipping"):
        each.sequences()


class Skipping(Dynamic):
    """Dynamic, and without steps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
