"""An encoder with exits keeps the laws for sentences of any lengths, in a model, a session and a stream."""

import pytest
import torch
from torch import nn

from dynanet import Budget, CostModel, calibrate, execute, forced, record, zoo
from dynanet.core.dynamic import everything
from dynanet.core.errors import ConfigError, InputError
from dynanet.gates.confidence import Entropy, Patience
from dynanet.session.session import Session
from dynanet.testing import check_dynamic, check_equal
from dynanet.train import MultiExit
from dynanet.zoo.text_encoder import exits_only, with_confidence

WORDS, LONGEST = 40, 9


def encoder(**more):
    torch.manual_seed(0)
    sizes = {"vocabulary": WORDS, "longest": LONGEST, "width": 12, "depth": 4, "heads": 2, "hidden": 24} | more
    model = zoo.text_exits(num_classes=3, **sizes).eval()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    model.thresholds.fill_(-0.15)
    return model


def sentences(count, shortest=2):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (count, LONGEST), generator=generator)
    lengths = torch.randint(shortest, LONGEST + 1, (count,), generator=generator)
    return ids * (torch.arange(LONGEST) < lengths[:, None])


class OfFloats(nn.Module):
    """Words and lengths drawn from floats (B, T, 2), which the laws can convert and mix."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        ids = 1 + (x.float()[..., 0].abs() * 12).long().clamp(max=WORDS - 2)
        length = 1 + (x.float()[:, :, 1] > 0)[:, 1:].sum(1)
        return self.model(ids * (torch.arange(x.shape[1]) < length[:, None]))


def test_laws():
    model = OfFloats(encoder(exits=(0, 1, 3)))
    check_dynamic(model, torch.randn(6, LONGEST, 2, generator=torch.Generator().manual_seed(0)))


def test_laws_by_patience():
    model = with_confidence(encoder(), Patience())
    model.thresholds.fill_(1.0)
    check_equal(OfFloats(model), torch.randn(5, LONGEST, 2, generator=torch.Generator().manual_seed(0)), draws=2)


def test_padding_changes_nothing_and_costs_nothing():
    model, ids = encoder(), sentences(1)
    length = int((ids != 0).sum())
    cost = CostModel(model, sentences(1, shortest=LONGEST))
    for sparse in (False, True):
        execute(model, sparse=sparse)
        with torch.no_grad(), record(model) as padded:
            answer = model(ids)
        with torch.no_grad(), record(model) as cut:
            torch.testing.assert_close(model(ids[:, :length]), answer, rtol=1e-4, atol=1e-5)
        assert cost.spent(padded).item() == pytest.approx(cost.spent(cut).item())
    assert cost.spent(padded).item() < cost.worst


@pytest.mark.parametrize("engines", ["eager", "onnxruntime"])
def test_a_session_and_its_stream_answer_as_the_model(engines):
    if engines == "onnxruntime":
        pytest.importorskip("onnxruntime")
    model, ids = encoder(depth=2), sentences(13)
    session = Session(model, ids, engines=engines, batches=(4,))
    with torch.no_grad(), record(execute(model, sparse=False)) as trace:
        expected = model(ids)
    assert 0 < float(trace[""][0].mean()) < 1, "somebody leaves, somebody stays"
    for batch in (1, 13):
        answers = torch.cat([session(part) for part in ids.split(batch)])
        torch.testing.assert_close(answers, expected, rtol=1e-3, atol=1e-3)
    for batch in (1, 3, 5, 20):
        streamed = torch.stack(list(session.stream(list(ids), batch=batch)))
        torch.testing.assert_close(streamed, expected, rtol=1e-3, atol=1e-3)
    assert session(ids[:0]).shape == (0, 3)


@pytest.mark.parametrize("active, limit", [((0, 1), None), ((1,), None), ((0, 1), 1)])
def test_a_sentence_alone_is_one_engine_per_step(active, limit):
    pytest.importorskip("onnxruntime")
    model, ids = encoder(depth=2), sentences(13, shortest=1)
    model.active, model.limit = active, limit
    session = Session(model, ids, batches=(4,))
    with torch.no_grad(), record(execute(model, sparse=False)):
        expected = model(ids)
    calls = listened(session)
    answers = torch.cat([session(one) for one in ids.split(1)])
    torch.testing.assert_close(answers, expected, rtol=1e-3, atol=1e-3)
    assert calls.count(None) == 0, "nothing but whole steps"
    with record(execute(model, sparse=True)) as trace:
        model(ids)
    went_on = sum(int(call.decision.keep.sum()) for call in trace.calls if call.name == "")
    assert len(calls) == 13 + went_on


def listened(session):
    """The number of every step that an engine runs for one sentence; None for another engine."""
    calls = []
    steps = {engine: k for k, engine in enumerate(session.engines()[: session.model.steps])}
    for engine in session.engines():
        engine.listener = lambda inputs, engine=engine: calls.append(steps.get(engine))
    return calls


def test_who_looks_on_sees_the_usual_way():
    pytest.importorskip("onnxruntime")
    model, ids = encoder(depth=2), sentences(1)
    session = Session(model, ids, batches=(4,))
    calls = listened(session)
    with record(session) as trace:
        session(ids)
    with torch.no_grad(), record(execute(model, sparse=True)) as expected:
        model(ids)
    assert trace.keys() == expected.keys() and set(calls) == {None}
    with forced(session, everything):
        torch.testing.assert_close(session(ids), model.answers(ids)[-1], rtol=1e-3, atol=1e-3)


def test_what_is_remembered_from_exit_to_exit_takes_the_usual_way():
    model, ids = with_confidence(encoder(depth=2), Patience()), sentences(5)
    model.thresholds.fill_(0.0)
    session = Session(model, ids, batches=(4,))
    assert model.part_by_part.one_row(model, 0) is None and model.part_by_part.one_row(model, 1) is not None
    for one in ids.split(1):
        torch.testing.assert_close(session(one), model(one), rtol=1e-3, atol=1e-3)


def test_a_budget_is_kept():
    model, ids = encoder(), sentences(40)
    labels = torch.randint(3, (40,), generator=torch.Generator().manual_seed(0))
    cost = CostModel(model, ids[:4])
    frontier = calibrate.calibrate(model, [(ids[:20], labels[:20]), (ids[20:], labels[20:])], cost)
    table = frontier.table
    assert table.macs.ndim == 2, "sentences of different lengths cost differently"
    budget = 0.6 * float(table.mean_macs[-1])
    with torch.no_grad(), record(early := execute(frontier.at(Budget(macs=budget)), sparse=True)) as trace:
        early(ids)
    assert float(cost.spent(trace).mean()) <= budget * 1.001


def test_the_second_stage_trains_the_early_exits_only():
    model = exits_only(encoder(dropout=0.0)).train()
    with record(model) as trace:
        answer = model(sentences(6))
    MultiExit(distill=1.0, temperature=1.0)(answer, torch.zeros(6, dtype=torch.int64), trace).backward()
    moved = {
        name.split(".")[0] + "." + name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None
    }
    assert moved == {"exits.0", "exits.1", "exits.2"}


def test_another_criterion_shares_the_weights():
    model = encoder()
    other = with_confidence(model, Entropy())
    assert other.stages[0][1].rest.up.weight is model.stages[0][1].rest.up.weight
    assert torch.isinf(other.thresholds).all() and other.rows is model.rows


@pytest.mark.parametrize(
    "ids, said",
    [
        (torch.zeros(2, 3), "torch.int64"),
        (torch.ones(2, LONGEST + 1, dtype=torch.int64), "at most 9"),
        (torch.tensor([[1, 2], [0, 0]]), r"sentence\(s\) \[1\]"),
        (torch.tensor([[1, 0, 2]]), "pad at the end"),
        (torch.tensor([[1, WORDS]]), "tokenizer of this encoder"),
        (torch.tensor([[0, 0]]), "no token"),
        (torch.tensor([[-1, 2]]), "tokenizer of this encoder"),
        (torch.tensor([1, 2]), "sentences"),
        (torch.tensor([1]), "sentences"),
        (torch.tensor(1), "sentences"),
    ],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_input_that_cannot_be_read(sparse, ids, said):
    with pytest.raises(InputError, match=said):
        execute(encoder().eval(), sparse=sparse)(ids)


@pytest.mark.parametrize("wrong, said", [
    ({"heads": 5}, "width must be a multiple of heads = 5"), ({"exits": (0, 1)}, "exits must be ascending"),
    ({"depth": 0}, "depth must be at least 1, got 0"), ({"dropout": 1.0}, "dropout 1.0"),
    ({"padding": WORDS}, f"padding {WORDS} of {WORDS} ids"),
])  # fmt: skip
def test_sizes_that_mean_nothing(wrong, said):
    with pytest.raises(ConfigError, match=said):
        encoder(**wrong)


def test_one_token():
    model = execute(encoder(), sparse=True)
    with torch.no_grad():
        one = model(torch.tensor([[3]]))
        torch.testing.assert_close(model(torch.tensor([[3, 0, 0], [4, 5, 0]]))[:1], one)
