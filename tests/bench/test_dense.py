"""What skips nothing answers the same for the padded rectangle of a batch, and gets nothing longer than that."""

import math

import pytest
import torch
from torch import nn

from dynanet import CostModel, execute, record, zoo
from dynanet.bench.comparison import compare
from dynanet.bench.dense import check_dense, rectangle_engines
from dynanet.core.errors import InputError
from dynanet.data.ragged import Sequences, pad, trimmed
from dynanet.mechanisms.early_stop import EarlyStop

LENGTHS = (3, 12, 7, 1, 12, 5, 9, 2)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def stop(cell=None, **more):
    model = EarlyStop(cell or nn.GRUCell(4, 8), nn.Linear(8, 3), 4, 8, longest=12, **more).eval()
    nn.init.normal_(model.frames.head.weight)
    return model


def batch(lengths=LENGTHS):
    return pad([torch.randn(n, 4) for n in lengths], steps=12)


def rows(x, first, end):
    return Sequences(x.x[first:end], x.lengths[first:end])


class Own(nn.Module):
    """A cell that torch does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(12, 8)

    def forward(self, x, state):
        return self.read(torch.cat([x, state], 1)).tanh()


@pytest.mark.parametrize(
    "cell",
    [
        nn.GRUCell(4, 8), nn.GRUCell(4, 8, bias=False), nn.LSTMCell(4, 8), nn.RNNCell(4, 8),
        nn.RNNCell(4, 8, nonlinearity="relu"),
    ],
    ids=str,
)  # fmt: skip
def test_recurrent_networks_are_fused(cell):
    model, x, told = stop(cell, every=3), batch(), []
    engines = rectangle_engines(model, x, told.append)
    assert list(engines) == [f"torch {type(cell).__name__.removesuffix('Cell')}", "onnxruntime"] and not told
    whole = [x, rows(x, 0, 1), rows(x, 3, 4)]
    check_dense(engines, model, whole, [trimmed(each) for each in whole])
    with torch.no_grad():
        model.frames.head.bias += 0.1
    with pytest.raises(InputError, match="8 of 8 answers of torch .* to the padded rectangle .* nothing is timed"):
        check_dense(engines, model, whole, [trimmed(each) for each in whole])


def test_a_rectangle_without_its_last_frames_is_noticed():
    model, x = stop(), batch()
    engines = rectangle_engines(model, x)
    short = Sequences(x.x[:, :11].contiguous(), x.lengths.clamp(max=11))
    with pytest.raises(InputError, match="2 of 8 answers"):
        check_dense(engines, model, [x], [short])


def test_another_cell_has_eager_alone_and_it_is_said():
    model, x, told = stop(Own()), batch(), []
    engines = rectangle_engines(model, x, told.append)
    assert list(engines) == ["eager"] and len(told) == 1 and "eager is the rival" in told[0]
    check_dense(engines, model, [x], [trimmed(x)])


@pytest.fixture(scope="module")
def sentences():
    torch.manual_seed(0)
    model = zoo.text_exits(num_classes=3, vocabulary=30, longest=12, width=8, depth=2, heads=2, hidden=8).eval()
    ids = torch.randint(2, 30, (8, 12)) * (torch.arange(12) < torch.tensor(LENGTHS)[:, None])
    return model, ids


def cut(ids):
    return ids[:, : max(2, int((ids != 0).sum(1).max()))]


def test_sentences_of_any_length_in_one_graph(sentences):
    model, ids = sentences
    told = []
    engines = rectangle_engines(model, ids, told.append)
    assert list(engines) == ["eager", "onnxruntime"] and not told
    whole = [ids, ids[:1], ids[2:4], ids[3:4]]
    check_dense(engines, model, whole, [cut(each) for each in whole])
    assert [cut(each).shape[1] for each in whole] == [12, 3, 7, 2]


def spent_alone(model, x, thresholds):
    """MACs per sequence, each run alone."""
    cost = CostModel(model, rows(x, 1, 2))
    model.thresholds.fill_(thresholds)
    total = 0.0
    for i in range(len(x.lengths)):
        with torch.no_grad(), record(execute(model, sparse=True)) as trace:
            model(trimmed(rows(x, i, i + 1)))
        total += float(cost.spent(trace))
    return total / len(x.lengths)


def test_sequences_of_different_lengths_are_compared():
    model, x = stop(every=2), batch()
    with torch.no_grad():
        sure = model.answers(x)[0].softmax(1).amax(1)
    threshold = float(sure.median()) + 1e-4
    model.thresholds.fill_(threshold)
    found = compare(model, x, batches=(1, 4), rounds=1)
    ratio = spent_alone(stop_like(model), x, torch.inf) / spent_alone(stop_like(model), x, threshold)
    for row in found:
        assert row.best_dense in ("torch GRU", "onnxruntime") and row.samples == 8
        assert row.macs_ratio == pytest.approx(ratio), "of reading every sequence to its end, not to the longest one's"
        assert row.over_flop_ratio == pytest.approx(row.over_same_engine / row.macs_ratio)
        assert all(value > 0 for value in (row.session_ms, row.stream_ms, row.best_dense_ms, row.reference_ms))
    assert ratio > 1.1


def stop_like(model):
    other = stop(every=2)
    other.load_state_dict(model.state_dict())
    return other


def test_sentences_of_different_lengths_are_compared(sentences):
    model, ids = sentences
    given = []
    (row,) = compare(model, ids, batches=(4,), rounds=1, cut=lambda x: given.append(cut(x)) or given[-1])
    assert row.best_dense in ("eager", "onnxruntime") and math.isfinite(row.over_best_dense)
    assert [x.shape for x in given[-2:]] == [(4, 12), (4, 12)] and given[0].shape == (1, 3)
    assert row.macs_ratio == pytest.approx(1), "nobody leaves"
