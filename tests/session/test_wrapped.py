"""A session that is pickled, copied, sent to a worker, or called by several threads answers as it does alone."""

import copy
import json
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._pytree import tree_flatten

from dynanet.core.dynamic import everything, forced, record
from dynanet.core.errors import InputError
from dynanet.core.halt import Halt
from dynanet.session.compiled import CompiledHalt
from dynanet.session.session import Session
from dynanet.session.stream import SequenceFrame
from tests.session.deployed import MODELS, make, rows
from tests.session.test_sequences import LONGEST, stopper

BOTH = pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
COPIES = {
    "pickled": lambda session: pickle.loads(pickle.dumps(session)),
    "copied": copy.deepcopy,
    "copied twice": lambda session: copy.deepcopy(copy.copy(session)),
}


def same(one, other):
    (ours, shape), (theirs, expected) = tree_flatten(one), tree_flatten(other)
    assert shape == expected
    for a, b in zip(ours, theirs, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@BOTH
@pytest.mark.parametrize("name", MODELS)
def test_copies_answer_alike(name, engine):
    each = make(name)
    session = Session(each.model, each.x, engines=engine, batches=(4,))
    again = COPIES["pickled"](session)
    assert again.units.keys() == session.units.keys()
    for batch in (slice(0, 1), slice(3, 12)):
        x = rows(each.x, batch)
        with record(session) as theirs, record(again) as ours:
            same(again(x), session(x))
        assert [(c.name, c.first) for c in ours.calls] == [(c.name, c.first) for c in theirs.calls]
        assert all(torch.equal(a.keep, b.keep) for a, b in zip(ours.calls, theirs.calls, strict=True))


@pytest.mark.parametrize("how", COPIES.values(), ids=list(COPIES))
def test_what_was_set_goes_along_and_stays_apart(how):
    each = make("staged resnet")
    session = Session(each.model, each.x, engines="eager", batches=(2, 4), threads=1)
    assert isinstance(session.model, CompiledHalt)
    session.model.source.thresholds.fill_(torch.inf)
    again = how(session)
    assert again._options == session._options
    same(again(each.x), session(each.x))
    before = session(each.x)
    again.model.source.thresholds.fill_(-torch.inf)
    same(session(each.x), before)
    with torch.no_grad():
        for weight in again.model.source.parameters():
            weight.zero_()
    same(session(each.x), before)


def test_what_cannot_be_copied_says_so():
    each = make("staged resnet")
    session = Session(each.model, each.x, engines="eager")
    with record(session), pytest.raises(InputError, match="recorded or forced"):
        pickle.dumps(session)
    with forced(session, everything), pytest.raises(InputError, match="recorded or forced"):
        copy.deepcopy(session)
    served = Session(stopper(), torch.zeros(1, LONGEST, 3).double(), engines="eager").sequences()
    for refused in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(InputError, match="copy the session"):
            refused(served)


WORKER = "import pickle, sys; session, x = pickle.load(open(sys.argv[1], 'rb')); print(session(x).tolist())"


def test_another_process(tmp_path):
    each = make("staged resnet")
    session = Session(each.model, each.x, engines="eager", batches=(4,))
    (tmp_path / "sent").write_bytes(pickle.dumps((session, each.x)))
    done = subprocess.run([sys.executable, "-c", WORKER, str(tmp_path / "sent")], capture_output=True, check=True)
    same(torch.tensor(json.loads(done.stdout)), session(each.x))


def in_threads(work, threads=4):
    """Call work(0), work(1), ... beside each other, and raise what they raised."""
    errors, start = [], threading.Barrier(threads)

    def caught(number):
        start.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=caught, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


@BOTH
@pytest.mark.parametrize("name", ["staged resnet", "skips in exits", "pytrees"])
def test_threads_that_call_one_session(name, engine):
    each = make(name)
    session = Session(each.model, each.x, engines=engine, batches=(1, 8))
    expected = session(each.x)

    def work(number):
        generator = torch.Generator().manual_seed(number)
        for _ in range(60):
            size = int(torch.randint(1, 20, (1,), generator=generator))
            at = int(torch.randint(0, 20, (1,), generator=generator))
            same(session(rows(each.x, slice(at, at + size))), rows(expected, slice(at, at + size)))

    in_threads(work)


@BOTH
def test_threads_that_stream_and_call(engine):
    each = make("staged resnet")
    session = Session(each.model, each.x, engines=engine, batches=(1, 8))
    assert isinstance(session.model, Halt)
    expected = session(each.x)

    def work(number):
        for _ in range(3):
            if number % 2:
                same(torch.stack(list(session.stream(each.x, batch=5))), expected)
            else:
                same(session(each.x), expected)

    in_threads(work)


def test_threads_that_serve_sequences():
    session = Session(stopper(), torch.zeros(1, LONGEST, 3).double(), engines="eager")
    frames = torch.randn(12, LONGEST, 3).double()
    alone = {}
    for i in range(12):
        arrivals = [SequenceFrame(i, frame) for frame in frames[i, : 1 + i % LONGEST]]
        alone.update({found.sequence: found for found in session.stream(arrivals)})
    serving, found = session.sequences(batch=4), {}

    def work(number):
        for i in range(number, 12, 4):
            for frame in frames[i, : 1 + i % LONGEST]:
                found.update({one.sequence: one for one in serving.read(i, frame)})
            found.update({one.sequence: one for one in serving.end(i)})

    in_threads(work)
    assert found.keys() == alone.keys()
    for i, one in found.items():
        same(one.answer, alone[i].answer)
        assert one.frames == alone[i].frames
