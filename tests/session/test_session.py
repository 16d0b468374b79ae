"""A session answers what the dense model answers, and its traces are the model's: for every kind of model."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.errors import InputError, StructureError
from dynanet.core.halt import Halt
from dynanet.core.rows import over_tensors
from dynanet.core.trace import Trace
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.session import engines
from dynanet.session.compiled import CompiledHalt, CompiledPart
from dynanet.session.selector import EnginesByBatch
from dynanet.session.session import Session
from tests.session.deployed import MODELS, ROWS, Deployed, exits_behind_a_stem, images, make, rows


@pytest.fixture(scope="module")
def deployed():
    """(name, engines) -> the model with inputs, and its session: made once for all tests here."""
    models: dict[str, Deployed] = {}
    sessions: dict[tuple[str, str], Session] = {}

    def get(name: str, engine: str = "eager") -> tuple[Deployed, Session]:
        if name not in models:
            models[name] = make(name)
        if (name, engine) not in sessions:
            sessions[name, engine] = Session(models[name].model, models[name].x, engines=engine, batches=(8,))
        return models[name], sessions[name, engine]

    return get


@torch.no_grad()
def dense(model: nn.Module, x) -> tuple[object, Trace]:
    with record(execute(model, sparse=False)) as trace:
        return model(x), trace


def same(one, other) -> None:
    (ours, shape), (theirs, expected) = tree_flatten(one), tree_flatten(other)
    assert shape == expected
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(a, torch.Tensor) or a is b
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


BOTH = pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
EVERY = pytest.mark.parametrize("name", MODELS)


@BOTH
@EVERY
def test_answers_decisions_and_prices_are_those_of_the_dense_model(name, engine, deployed):
    each, session = deployed(name, engine)
    cost = CostModel(each.model, rows(each.x, slice(2)))
    for batch in (slice(0, 3), slice(5, 6), slice(0, 8), slice(0, ROWS), slice(0, 0), slice(20, 37)):
        x = rows(each.x, batch)
        expected, theirs = dense(each.model, x)
        same(session(x), expected)
        with record(session) as ours:
            same(session(x), expected)
        reached = [call for call in theirs.calls if call.keep.any() or call.name in ours.keys()]
        for call, other in zip(ours.calls, reached, strict=False):
            assert (call.name, call.first) == (other.name, other.first)
            assert torch.equal(call.keep, other.keep)
        if theirs.calls and batch != slice(0, 0):
            torch.testing.assert_close(cost.spent(ours), cost.spent(theirs), rtol=1e-9, atol=0)


@BOTH
@EVERY
def test_a_later_call_leaves_earlier_answers_alone(name, engine, deployed):
    each, session = deployed(name, engine)
    answers = [session(rows(each.x, slice(i, i + n))) for i, n in ((0, 5), (5, 5), (3, 1), (0, ROWS))]
    kept = [over_tensors(torch.clone, answer) for answer in answers]
    for i in range(0, ROWS, 5):
        session(rows(each.x, slice(i, i + 5)))
    for answer, as_it_was in zip(answers, kept, strict=True):
        for a, b in zip(tree_flatten(answer)[0], tree_flatten(as_it_was)[0], strict=True):
            assert a is b or torch.equal(a, b)


@BOTH
@pytest.mark.parametrize("name", ["pytrees", "what came, handed on", "one halt, called twice"])
def test_a_trace_outlives_the_pass(name, engine, deployed):
    each, session = deployed(name, engine)
    with record(session) as trace:
        session(each.x)
    remembered = [[call.keep, call.decision.score] for call in trace.calls], trace.answers
    kept = over_tensors(torch.clone, remembered)
    session(tree_map(lambda t: t.flip(0), each.x))
    for a, b in zip(tree_flatten(remembered)[0], tree_flatten(kept)[0], strict=True):
        assert a is b or torch.equal(a, b)


@BOTH
@EVERY
def test_forced_decisions_are_obeyed(name, engine, deployed):
    each, session = deployed(name, engine)
    for keep in (everything, lambda d: torch.zeros_like(d.keep)):
        with forced(session, keep):
            ours = session(each.x)
        with forced(each.model, keep):
            theirs, _ = dense(each.model, each.x)
        same(ours, theirs)
    same(session(each.x), dense(each.model, each.x)[0])


@BOTH
@pytest.mark.parametrize("name", ["skips in exits", "exits behind a stem", "pytrees"])
def test_the_hard_cap_holds_whatever_the_scores_say(name, engine):
    each = make(name)
    halt = next(m for m in each.model.modules() if isinstance(m, Halt))
    halt.thresholds.fill_(torch.inf)
    for limit in (1, 2):
        halt.limit = limit
        session = Session(each.model, each.x, engines=engine, batches=(8,))
        for x in (each.x, rows(each.x, slice(1))):
            same(session(x), dense(each.model, x)[0])
            with record(session) as trace, forced(session, everything):
                session(x)
            name_of = next(n for n, m in session.named_modules() if isinstance(m, Halt))
            assert len(trace.answers[name_of]) == limit
            assert all(call.first < limit - 1 for call in trace.calls if call.name == name_of)


def test_what_a_row_skips_is_not_computed(deployed):
    each, session = deployed("msdnet", "onnxruntime")
    _, trace = dense(each.model, each.x)
    arrive = [ROWS, *(int(keep.sum()) for keep in trace[""])]
    met = []
    for engine in session.engines():
        engine.listener = lambda inputs: met.append(inputs[0].shape[0])
    session(each.x)
    for engine in session.engines():
        engine.listener = None
    assert met == arrive and arrive[0] > arrive[1] > arrive[2] > 0


def test_engines_take_the_place_of_all_that_is_static(deployed):
    _, session = deployed("msdnet", "onnxruntime")
    assert isinstance(session.model, CompiledHalt) and len(session.engines()) == 3
    assert not list(session.model.parameters())
    _, session = deployed("skips in exits", "onnxruntime")
    units = [name for name, m in session.model.named_modules() if isinstance(m, CompiledPart)]
    assert "stages.0" in units and "stages.1.block" in units and "exits.2" in units
    _, session = deployed("static", "onnxruntime")
    assert isinstance(session.model, CompiledPart) and len(session.engines()) == 1


def test_what_was_measured_is_told(deployed):
    each, _ = deployed("staged resnet", "onnxruntime")
    session = Session(each.model, each.x, engines="onnxruntime", batches=(8, 1))
    assert list(session.units) == ["step0", "step1"]
    for unit in session.units.values():
        assert list(unit) == [1, 8] and all(ms > 0 for by_engine in unit.values() for ms in by_engine.values())
    fastest = Session(each.model, each.x, batches=(8,))
    assert {"eager", "onnxruntime"} <= set(fastest.units["step0"][8])
    same(fastest(each.x), dense(each.model, each.x)[0])


@pytest.mark.parametrize("rows_, size", [(1, 1), (2, 1), (3, 8), (8, 8), (22, 8), (23, 64), (64, 64), (9999, 64)])
def test_the_engine_of_the_nearest_batch_size_runs(rows_, size):
    by_batch = EnginesByBatch({n: lambda inputs, n=n: [n] for n in (64, 1, 8)}, [])
    assert by_batch([torch.zeros(rows_, 3)]) == [size]


def test_the_model_stays_as_it_is():
    model = make("skips in exits").model.train()
    model.stages[0][0].weight.requires_grad_()
    before = copy.deepcopy(model.state_dict())
    session = Session(model, images()[:2], engines="eager")
    session(images())
    assert model.training and not any(m.sparse for m in model.modules() if isinstance(m, EarlyExit))
    assert model.stages[0][0].weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {n for n, m in session.named_modules() if isinstance(m, Halt)} == {""}


@BOTH
def test_a_part_that_gets_another_size_runs_as_it_is(engine):
    torch.manual_seed(0)

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.look, self.exits = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), exits_behind_a_stem()[1]

        def forward(self, x):
            return self.exits(self.look(x)) + self.look(x[:, :, ::2, ::2]).mean((2, 3))[:, :3]

    model, x = Pyramid().eval(), images()
    session = Session(model, x, engines=engine, batches=(8,))
    assert isinstance(session.model.look, CompiledPart)
    for n in (1, 4, ROWS):
        same(session(x[:n]), dense(model, x[:n])[0])


@BOTH
def test_parts_that_take_or_answer_something_else_than_rows_are_left_alone(engine):
    class Odd(nn.Module):
        """A part called with a keyword, one that answers no tensor, one that answers no rows."""

        def __init__(self) -> None:
            super().__init__()
            self.scale, self.pair, self.total, self.tail = Scale(), Pair(), Total(), exits_behind_a_stem()

        def forward(self, x):
            x, name = self.pair(self.scale(x, by=2.0))
            assert name == "pair"
            return self.tail(x) + 0 * self.total(x).sum()

    class Scale(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 3, 1)

        def forward(self, x, by):
            return by * super().forward(x)

    class Pair(Scale):
        def forward(self, x):
            return super().forward(x, 1.0), "pair"

    class Total(Scale):
        def forward(self, x):
            return super().forward(x, 1.0).mean((0, 2, 3))

    torch.manual_seed(0)
    model, x = Odd().eval(), images()
    session = Session(model, x, engines=engine, batches=(8,))
    same(session(x[:7]), dense(model, x[:7])[0])


def test_static_parts_are_called_with_as_many_rows_as_their_layer_makes_of_a_sample():
    """Positions as rows: (B, T, D) flattened to (B * T, D) in front of a part."""

    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.exits = nn.Linear(4, 6), EarlyExit([nn.Linear(6, 6)], [nn.Linear(6, 2)])

        def forward(self, x):
            return self.exits(self.map(x.flatten(0, 1))).unflatten(0, x.shape[:2])

    torch.manual_seed(0)
    model, x = Flattened().eval(), torch.randn(9, 5, 4)
    session = Session(model, x, engines="onnxruntime", batches=(1, 8))
    assert session.units["map"][8].keys() == {"onnxruntime", "onnxruntime, 4 at a time", "onnxruntime, 16 at a time"}
    for n in (1, 9, 0):
        same(session(x[:n]), dense(model, x[:n])[0])


def test_without_onnxruntime_it_says_so_once_and_runs_eager(monkeypatch, caplog):
    each = make("staged resnet")
    monkeypatch.setattr(engines, "require", engines.require)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)  # what Python takes for "not installed"
    engines.onnx_runtime.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            sessions = [Session(each.model, each.x, engines=e) for e in ("fastest", "onnxruntime", "eager")]
    finally:
        engines.onnx_runtime.cache_clear()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("dynanet")]
    assert len(said) == 1 and "pip install 'dynanet[onnx]'" in said[0]
    for session in sessions:
        assert session.units == {}
        same(session(each.x), dense(each.model, each.x)[0])


def test_bad_examples_and_engines_are_refused():
    model = exits_behind_a_stem().eval()
    with pytest.raises(InputError, match="at least one sample"):
        Session(model, torch.zeros(0, 3, 12, 12))
    with pytest.raises(InputError, match="'fastest', 'eager' or 'onnxruntime'"):
        Session(model, images()[:1], engines="tensorrt")


def test_bad_input_is_refused_before_anything_runs(deployed):
    each, session = deployed("staged resnet")
    bad = each.x.clone()
    bad[4, 0, 3, 3] = torch.nan
    for x, says in [
        (bad, r"sample\(s\) \[4\]"),
        (each.x[:, :2], "2 channels instead of 3"),
        (each.x[0], "batch axis is missing"),
        (each.x[..., :5], "another size"),
        (each.x.double(), "torch.float64"),
        ([each.x], "list"),
    ]:
        with pytest.raises(InputError, match=says):
            session(x)


def test_a_larger_batch_than_any_before(deployed):
    each, session = deployed("pytrees", "onnxruntime")
    for times in (1, 3, 11):
        x = tree_map(lambda t, n=times: t.repeat(n, *[1] * (t.dim() - 1)), each.x)
        same(session(x), dense(each.model, x)[0])


def test_thresholds_are_read_at_every_call():
    each = make("pytrees")
    session = Session(each.model, each.x, engines="eager")
    session.model.source.thresholds.fill_(torch.inf)
    each.model.thresholds.fill_(torch.inf)
    same(session(each.x), dense(each.model, each.x)[0])


def test_a_part_that_no_graph_can_hold_runs_eager_and_says_so(caplog):
    class Choosy(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    torch.manual_seed(0)
    model = nn.Sequential(Choosy(4, 4), EarlyExit([nn.Linear(4, 4)], [nn.Linear(4, 2)]))
    x = torch.randn(9, 4)
    session = Session(model, x, batches=(8,))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("dynanet")]
    assert len(said) == 1 and said[0].startswith("0 runs eager") and "\n" not in said[0]
    assert list(session.units) == ["1.step0"]
    same(session(x), dense(model.eval(), x)[0])
    with pytest.raises(StructureError, match="ONNX Runtime cannot run"):
        Session(model, x, engines="onnxruntime")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY
def test_on_a_gpu(name, deployed):
    each, _ = deployed(name)
    session = Session(each.model, each.x, device="cuda")
    answers = tree_map(lambda t: t.cpu(), session(each.x))
    same(answers, dense(each.model, each.x)[0])


@pytest.mark.parametrize("engines_, inside", [("onnxruntime", 1), ("eager", 2)])
def test_torch_moves_rows_on_one_thread_and_gets_the_others_back(engines_, inside, monkeypatch):
    each = make("skips in exits" if engines_ == "eager" else "msdnet")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        session = Session(each.model, each.x[:1], engines=engines_, batches=(4,))
        seen = []
        rule = type(session.model).should_continue
        monkeypatch.setattr(
            type(session.model), "should_continue", lambda *a: seen.append(torch.get_num_threads()) or rule(*a)
        )
        same(session(each.x), dense(each.model, each.x)[0])
        assert set(seen) == {inside} and torch.get_num_threads() == 2
        with pytest.raises(InputError):
            session(each.x * torch.nan)
        list(session.stream(each.x, batch=2))
        assert set(seen) == {inside} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
