"""A comparison is made of answers that are equal, and its four numbers hang together."""

import copy
import math
from dataclasses import asdict
from importlib import import_module

import pytest
import torch
from torch import nn

from dynanet import zoo
from dynanet.bench.comparison import check_equivalent, compare, latency_theory, line
from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import record
from dynanet.core.errors import InputError
from dynanet.core.gate import Gate
from dynanet.core.macs import CountMacs
from dynanet.gates.rules import Threshold
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip
from dynanet.ops.native.attention import attend_packed
from dynanet.ops.native.library import fit
from dynanet.session.session import Session

X = torch.randn(40, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = zoo.staged_resnet(num_classes=3, widths=(4, 8), depths=(1, 1), context=4).eval()
    scores = net.confidence(net.answers(X)[0], None).flatten().sort().values
    gap = scores[12:28].diff().argmax() + 12
    net.thresholds.fill_(scores[gap : gap + 2].mean().item())
    return net


@pytest.fixture(scope="module")
def rows(model):
    told = []
    before = torch.get_num_threads()
    found = compare(model, X, batches=(1, 16), threads=(1,), rounds=2, echo=told.append)
    assert torch.get_num_threads() == before
    return found, told


def test_a_row_for_every_batch_and_thread_count(rows):
    found, told = rows
    cells = [(row.batch, row.threads, row.samples) for row in found]
    assert cells == [(1, 1, 40), (16, 1, 32)]
    assert told == [line(row) for row in found] and all("\n" not in each for each in told)
    for row in found:
        for name, value in asdict(row).items():
            assert isinstance(value, str) or (math.isfinite(value) and value > 0), name
        assert row.best_dense in ("eager", "eager channels_last", "onnxruntime")
        low, high = map(float, row.spread.split("-"))
        assert low <= high


def test_every_thread_count_has_its_rows(model, monkeypatch):
    counts = []  # not timed: on a busy machine several threads wait for each other
    module = import_module("dynanet.bench.comparison")  # the package has a function of that name
    monkeypatch.setattr(module, "_row", lambda *_: counts.append(torch.get_num_threads()) or counts[-1])
    monkeypatch.setattr(module, "line", str)
    assert compare(model, X, batches=(1,), threads=(1, 2), echo=lambda _: None) == [1, 2] == counts


def test_the_numbers_hang_together(rows, model):
    cost = CostModel(model, X[:1])
    for row in rows[0]:
        with torch.no_grad(), record(model) as trace:
            model(X[: row.samples])
        assert row.macs_ratio == pytest.approx(cost.worst / cost.spent(trace).mean().item())
        assert row.over_flop_ratio == pytest.approx(row.over_same_engine / row.macs_ratio)
        low, high = map(float, row.spread.split("-"))
        assert low - 0.01 <= row.over_reference <= high + 0.01


def test_the_model_is_left_as_it_was(model):
    net = copy.deepcopy(model).train()
    before = copy.deepcopy(net.state_dict())
    compare(net, X, batches=(8,), rounds=1)
    assert net.training and not net.sparse
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_model_without_steps_has_no_stream():
    torch.manual_seed(0)
    skip = LayerSkip(nn.Conv2d(3, 3, 3, padding=1), Gate(Mean(), Threshold()))
    (row,) = compare(nn.Sequential(skip, nn.Flatten(), nn.Linear(300, 2)), X, batches=(8,), rounds=1)
    assert math.isnan(row.stream_ms) and math.isnan(row.stream_over_latency_theory)
    assert row.session_ms > 0 and row.macs_ratio > 1 and row.over_latency_theory > 0


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((1, 2, 3))[:, None]


def test_fewer_samples_than_a_batch(model):
    with pytest.raises(InputError, match="40 samples for a batch of 64"):
        compare(model, X, batches=(1, 64))


def test_other_weights_are_not_timed(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.exits[-1][-1].bias += 0.1
    session = Session(other, X, engines="eager")
    with pytest.raises(InputError, match="differ from the dense model's, .* nothing is timed"):
        check_equivalent(model, session, X)
    check_equivalent(other, session, X)


def test_not_one_answer_may_differ_after_the_same_decisions():
    torch.manual_seed(0)
    net, x = nn.Linear(4, 2), torch.randn(40, 4)
    x[:, 3] = 0
    x[17, 3] = 1  # the only sample that sees what is about to change
    session = Session(net, x, engines="eager")
    check_equivalent(net, session, x)
    with torch.no_grad():
        net.weight[0, 3] += 0.1
    with pytest.raises(InputError, match="1 of 40 answers .* 1 of them after the same decisions"):
        check_equivalent(net, session, x)


def test_decisions_at_the_threshold_may_fall_either_way(model):
    """One in a thousand samples, and one at least, may leave elsewhere; more may not."""
    scores = model.confidence(model.answers(X)[0], None).flatten().sort().values
    nudged = copy.deepcopy(model)
    here = int((scores < model.thresholds[0]).sum())
    nudged.thresholds.fill_(scores[here : here + 2].mean().item())
    check_equivalent(model, Session(nudged, X, engines="eager"), X)
    nudged.thresholds.fill_(scores[here + 4 : here + 6].mean().item())
    with pytest.raises(InputError, match="5 of 40 answers .* 0 of them after the same decisions"):
        check_equivalent(model, Session(nudged, X, engines="eager"), X)


def test_decisions_that_a_sparse_run_never_comes_to():
    torch.manual_seed(0)
    inner = LayerSkip(nn.Linear(4, 4), Gate(nn.Linear(4, 1), Threshold()))
    outer = LayerSkip(nn.Sequential(nn.Linear(4, 4), inner), Never())
    last = LayerSkip(nn.Linear(4, 4), Gate(nn.Linear(4, 1), Threshold()))
    exits = EarlyExit([nn.Sequential(outer, last), nn.Sequential(copy.deepcopy(last))], [nn.Linear(4, 2)] * 2)
    exits.thresholds.fill_(-torch.inf)  # everybody leaves at once
    net, x = exits.eval(), torch.randn(12, 4)
    check_equivalent(net, Session(net, x, engines="eager"), x)


class Never(nn.Module):
    def forward(self, x):
        return Decision(torch.zeros(x.shape[0], 1), torch.zeros(x.shape[0], 1))


def test_latency_theory_has_engines_and_the_attention_between_them():
    torch.manual_seed(0)
    net = zoo.text_exits(num_classes=3, vocabulary=30, longest=12, width=8, depth=2, heads=2, hidden=8).eval()
    ids = torch.randint(2, 30, (4, 12)) * (torch.arange(12) < torch.tensor([3, 12, 7, 5])[:, None])
    session = Session(net, ids, engines="eager")
    theory = latency_theory(session, [ids[:2], ids[2:]])
    if fit():
        assert len(theory.attention) == 4, "two layers, two batches: nobody leaves"
    assert all(engine.listener is None for engine in session.engines())
    with CountMacs() as counted:
        theory.run()
    with CountMacs() as whole:
        session(ids[:2])
        session(ids[2:])
    assert counted.total == whole.total


def test_attention_inside_an_engine_is_not_counted_twice():
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return attend_packed(x * self.weight, x, x, None, [1] * x.shape[0], 2)

    if not fit():
        pytest.skip("no native kernels")
    session = Session(Attends().requires_grad_(False).eval(), torch.randn(6, 8), engines="eager")
    x = torch.randn(6, 8)
    theory = latency_theory(session, [x])
    assert len(theory.engines) == 1 and not theory.attention
