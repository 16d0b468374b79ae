"""What every layer over time does with sequences that are empty, short, long, of mixed lengths, or broken."""

import pytest
import torch
from torch import nn

from dynanet import execute, record
from dynanet.core.errors import DataError, InputError
from dynanet.core.macs import CountMacs
from dynanet.data.ragged import Sequences, pad
from dynanet.mechanisms.clip_sampling import ClipSampling
from dynanet.mechanisms.early_stop import EarlyStop, steps_read
from dynanet.mechanisms.frame_exit import ExitGate, FrameExit, frames_read
from dynanet.mechanisms.frame_select import FrameSelect
from dynanet.mechanisms.jump import Jump
from dynanet.mechanisms.skim import Skim
from dynanet.mechanisms.update_skip import UpdateSkip
from dynanet.session import EndOfSequence, SequenceFrame, Session

LONGEST = 7
SERIES, VIDEO = (3,), (2, 2, 2)  # of one step


def flat(outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(8, outputs))


def frame_exit(longest=LONGEST):
    gates = [ExitGate(5, widths=(4, 3), first=k == 0) for k in range(3)]
    return FrameExit(flat(5), [nn.Linear(5, 4) for _ in range(4)], gates, longest=longest)


def frame_select():
    return FrameSelect(flat(5), [flat(4)], ((2, 2),), features=5, hidden=6, num_classes=4)


LAYERS = {
    "update skip": (lambda: UpdateSkip(nn.GRUCell(3, 5), 3, 5), SERIES),
    "skim": (lambda: Skim(nn.LSTMCell(3, 5), nn.LSTMCell(3 + 3, 2), 3, 5, 2, reading=0.0), SERIES),
    "jump": (lambda: Jump(nn.GRUCell(3, 5), 3, 5, read=2, reach=2, jumps=4), SERIES),
    "early stop": (lambda: EarlyStop(nn.GRUCell(3, 5), nn.Linear(5, 4), 3, 5, LONGEST, every=2), SERIES),
    "early stop, policy": (
        lambda: EarlyStop(nn.GRUCell(3, 5), nn.Linear(5, 4), 3, 5, LONGEST, policy=nn.Linear(5, 1)),
        SERIES,
    ),
    "frame select": (frame_select, VIDEO),
    "frame exit": (frame_exit, VIDEO),
    "clip sampling": (lambda: ClipSampling(flat(1), flat(4), 2, 4), VIDEO),
}


@pytest.fixture(params=[f"{name}, {form}" for name in LAYERS for form in ("dense", "sparse")])
def case(request):
    """A layer in eval mode, and the shape of a step."""
    name, form = request.param.rsplit(", ", 1)
    torch.manual_seed(1)
    make, step = LAYERS[name]
    with torch.no_grad():
        yield execute(make().double().eval(), sparse=form == "sparse"), step


def test_empty_sequences_are_refused(case):
    layer, step = case
    with pytest.raises(InputError, match="expected"):
        layer(torch.zeros(2, 0, *step).double())
    for lengths in ([3, 0], [3, -1], [3, 9]):
        with pytest.raises(InputError, match=rf"lengths from {min(lengths)} to {max(lengths)} in a batch of 4 steps"):
            layer(Sequences(torch.zeros(2, 4, *step).double(), torch.tensor(lengths)))
    with pytest.raises(InputError, match="one whole number each"):
        layer(Sequences(torch.zeros(2, 4, *step).double(), torch.tensor([4.0, 2.0])))


def test_one_step_and_no_row(case):
    layer, step = case
    x = torch.randn(3, 4, *step).double()
    one = layer(x[:, :1])
    torch.testing.assert_close(layer(Sequences(x, torch.ones(3, dtype=torch.int64))), one, rtol=1e-12, atol=1e-12)
    assert one.isfinite().all()
    assert layer(x[:0]).shape == (0, *one.shape[1:])
    assert layer(Sequences(x[:0], torch.zeros(0, dtype=torch.int64))).shape == (0, *one.shape[1:])


def test_lengths_in_a_batch_are_as_each_alone(case):
    layer, step = case
    x, lengths = torch.randn(5, LONGEST, *step).double(), torch.tensor([LONGEST, 1, 4, 2, LONGEST])
    together = layer(Sequences(x, lengths))
    for row, n, answer in zip(x, lengths.tolist(), together, strict=True):
        torch.testing.assert_close(layer(row[None, :n])[0], answer, rtol=1e-12, atol=1e-12)


def test_nan_stays_in_its_row(case):
    layer, step = case
    x = torch.randn(3, LONGEST, *step).double()
    clean = layer(x)
    x[1, 0] = torch.nan
    torch.testing.assert_close(layer(x)[[0, 2]], clean[[0, 2]], rtol=1e-12, atol=1e-12)


def test_nan_behind_the_end_is_never_read_sparsely(case):
    layer, step = case
    x, lengths = torch.randn(3, LONGEST, *step).double(), torch.tensor([5, 2, LONGEST])
    clean = execute(layer, sparse=True)(Sequences(x, lengths))
    behind = x.clone()
    behind[0, 5:], behind[1, 2:] = torch.nan, torch.nan
    torch.testing.assert_close(layer(Sequences(behind, lengths)), clean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_a_session_refuses_nan_and_says_how_to_pad(name):
    make, step = LAYERS[name]
    torch.manual_seed(1)
    layer, x = make().eval(), torch.randn(3, LONGEST, *step)
    session = Session(layer, Sequences(x, torch.tensor([LONGEST, 2, 4])), engines="eager")
    x[1, 1] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinite values in sample\(s\) \[1\]"):
        session(Sequences(x, torch.tensor([LONGEST, 2, 4])))
    with pytest.raises(InputError, match=rf"4 steps instead of {LONGEST}; pad sequences"):
        session(Sequences(torch.randn(2, 4, *step), torch.tensor([4, 2])))


def test_a_session_takes_shorter_batches_that_are_padded():
    layer = LAYERS["early stop"][0]().eval()
    session = Session(layer, pad([torch.randn(3, 3)], steps=LONGEST), engines="eager")
    xs = [torch.randn(n, 3) for n in (4, 2)]
    with torch.no_grad():
        torch.testing.assert_close(session(pad(xs, steps=LONGEST)), layer(pad(xs)))
    with pytest.raises(DataError, match="9 steps for a batch of 7"):
        pad([torch.zeros(9, 3)], steps=LONGEST)


MANY = 100_000


def test_a_hundred_thousand_steps_cost_what_is_read_of_them():
    """Stops leave the rest alone, whatever there is of it; what lies behind a sequence's end is not looped over."""
    torch.manual_seed(1)
    stop = EarlyStop(nn.GRUCell(3, 5), nn.Linear(5, 4), 3, 5, MANY, every=100)
    stop.thresholds.fill_(-torch.inf)
    videos = frame_exit(longest=1000)
    videos.thresholds.fill_(torch.inf)
    x, frames = torch.randn(1, MANY, 3), torch.randn(1, 1000, *VIDEO)
    for layer, given, read, macs in (
        (stop, x, steps_read, 100 * 3 * 5 * (3 + 5) + 5 * 4),
        (videos, frames, frames_read, None),
    ):
        with torch.no_grad(), record(execute(layer.eval(), sparse=True)) as trace, CountMacs() as count:
            assert layer(given).isfinite().all()
        assert read(trace).item() == (100 if layer is stop else 4)
        assert macs is None or count.total == macs


def test_a_hundred_thousand_frames_one_by_one():
    """A stream stops reading at the answer, and remembers one state of a sequence however long it is."""
    stop = EarlyStop(nn.GRUCell(3, 5), nn.Linear(5, 4), 3, 5, MANY, every=50)
    stop.thresholds.fill_(-torch.inf)
    session = Session(stop.eval(), torch.zeros(1, 1, 3), engines="eager")
    frame = torch.zeros(3)
    arrivals = (SequenceFrame("a", frame) if t < MANY else EndOfSequence("a") for t in range(MANY + 1))
    (answered,) = session.stream(arrivals, batch=1)
    assert answered.frames == 50


def test_a_hundred_thousand_steps_most_of_which_are_skipped():
    """What nobody reads takes no time to speak of: it is not looped over."""
    torch.manual_seed(1)
    skip = execute(UpdateSkip(nn.GRUCell(3, 5), 3, 5).eval(), sparse=True)
    nn.init.zeros_(skip.delta.weight)
    nn.init.constant_(skip.delta.bias, -9.0)  # an update every few thousand steps
    jump = execute(Jump(nn.GRUCell(3, 5), 3, 5, read=2, reach=50, jumps=4).eval(), sparse=True)
    reads: list[int] = []
    jump.cell.register_forward_pre_hook(lambda cell, given: reads.append(len(given[0])))
    x = torch.randn(1, MANY, 3)
    with torch.no_grad():
        assert skip(x).isfinite().all() and jump(x).isfinite().all()
    assert 2 <= len(reads) <= 10
