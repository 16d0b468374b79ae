import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, execute, record
from dynanet.core.errors import StructureError
from dynanet.core.gate import Gate
from dynanet.core.halt import Halt, ThresholdHalt
from dynanet.core.rows import LEADING, LeadingAnswers
from dynanet.core.trace import Frame
from dynanet.gates.rules import Sigmoid, Threshold
from dynanet.mechanisms.layer_skip import LayerSkip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def skip(block, rule=None):
    return LayerSkip(block, Gate(nn.Linear(4, 1), rule or Threshold()))


class Nest(nn.Module):
    """A layer in a layer: the inner one speaks of the rows that the outer one kept."""

    def __init__(self, rule=None) -> None:
        super().__init__()
        self.outer = skip(nn.Sequential(nn.Linear(4, 4), skip(nn.Linear(4, 4), rule)), rule)

    def forward(self, x):
        return self.outer(x)


def keeps(lead, seed):
    return (torch.rand(lead, generator=torch.Generator().manual_seed(seed)) < 0.5).double()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_frame_takes_home_the_same_keep_from_dense_and_sparse_rows(lead, seed, flat):
    """Dense: the unit sees all rows, along one axis or in their layout. Sparse: those that were taken."""
    outer = keeps(lead, seed)
    everywhere = keeps((*lead, 3), seed + 1)
    taken = outer.flatten().nonzero().squeeze(1)
    sparse = Frame(None, range(1), lead, taken, None, flat)
    dense = Frame(None, range(1), lead, None, outer.flatten(), flat)
    seen = everywhere.flatten(0, len(lead) - 1) if flat else everywhere
    assert torch.equal(
        sparse.home(everywhere.flatten(0, len(lead) - 1)[taken]),
        dense.home(seen),
    )
    assert torch.equal(dense.home(seen), everywhere * outer[..., None])


@given(st.integers(0, 6), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_nested_layer_is_heard_for_the_whole_batch(batch, seed):
    torch.manual_seed(seed)
    model, x = Nest().eval(), torch.randn(batch, 4)
    traces = []
    for sparse in (False, True):
        execute(model, sparse=sparse)
        with torch.no_grad(), record(model) as trace:
            model(x)
        traces.append(trace)
    dense, sparse = traces
    outer, inner = dense["outer"][0], dense["outer.block.1"][0]
    assert outer.shape == inner.shape == (batch, 1)
    assert not inner[outer == 0].any()
    assert torch.equal(sparse["outer"][0], outer)
    if outer.any():
        assert torch.equal(sparse["outer.block.1"][0], inner)
        local = sparse.calls[1].decision  # as the layer saw it: only the rows that arrived
        assert local.keep.shape == local.score.shape == (int(outer.sum()), 1)
    else:
        assert sparse["outer.block.1"] == [], "a unit that no row keeps is not called, so nothing is decided in it"


def test_a_call_knows_the_units_around_it():
    model = Nest().eval()
    with record(model) as trace:
        model(torch.randn(2, 4))
    assert [(call.name, call.within) for call in trace.calls] == [("outer", ()), ("outer.block.1", (("outer", 0),))]


def test_an_inner_keep_carries_gradients_to_the_outer_gate():
    model = Nest(Sigmoid()).train()
    with record(model) as trace:
        model(torch.randn(5, 4))
    trace["outer.block.1"][0].sum().backward()
    for layer in (model.outer, model.outer.block[1]):
        assert layer.gate.scorer.weight.grad.abs().sum() > 0


def test_frames_of_rows_in_their_layout_and_along_one_axis_nest():
    """A layer over samples, in it one over tokens whose unit keeps the layout, in it one over the same tokens."""

    class InLayout(LeadingAnswers):
        flat = False

        def whole(self, x, lead):
            return x

        def take(self, x, lead, index):
            return LEADING.take(x, lead, index)

        def mask(self, y, lead, keep, otherwise):
            k = keep.reshape(*lead, *[1] * (y.dim() - len(lead)))
            return k * y + (1 - k) * otherwise

    class PerToken(Dynamic):
        def __init__(self, inner) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            score = x[..., :1]
            keep = self.tap(Decision((score > 0).to(x), score)).keep[..., 0]
            return self.run(0, self.inner, keep, x, otherwise=x, rows=InLayout())

    class FirstFeature(nn.Module):
        def forward(self, x):
            return x[:, 0, :1]

    model = LayerSkip(PerToken(PerToken(nn.Linear(4, 4))), Gate(FirstFeature(), Threshold())).eval()
    x = torch.randn(6, 5, 4)
    execute(model, sparse=False)
    with record(model) as dense:
        model(x)
    execute(model, sparse=True)
    with record(model) as sparse:
        model(x)
    expected = (x[:, 0, :1] > 0).float()[:, None] * (x[..., :1] > 0)
    for trace in (dense, sparse):
        assert torch.equal(trace["block"][0], expected)
        assert torch.equal(trace["block.inner"][0], expected)


def test_a_shared_layer_is_heard_once_per_call():
    cell = skip(nn.Linear(4, 4)).eval()
    model = nn.Sequential(cell, nn.Tanh(), cell)
    with record(model) as trace:
        model(torch.randn(3, 4))
    assert len(trace["0"]) == 2 and trace.keys() == ["0"]


def test_an_unknown_name_is_told_what_there_is():
    with record(Nest()) as trace:
        pass
    assert trace["outer"] == []
    with pytest.raises(KeyError, match=r"'inner' is not a dynamic layer.*outer\.block\.1"):
        trace["inner"]


def test_recording_twice_is_refused_also_for_a_part():
    model = Nest()
    with record(model) as trace:
        for again in (model, model.outer.block):
            with pytest.raises(RuntimeError, match="recorded already"), record(again):
                pass
        model(torch.randn(2, 4))
    assert len(trace.calls) == 2, "the open trace goes on undisturbed"


def test_an_exception_ends_the_recording():
    model = Nest()
    with pytest.raises(ZeroDivisionError), record(model) as broken:
        model(torch.randn(2, 4))
        raise ZeroDivisionError
    model(torch.randn(2, 4))
    assert len(broken.calls) == 2
    with record(model) as trace:
        model(torch.randn(2, 4))
    assert len(trace.calls) == 2


def test_an_exception_inside_a_unit_closes_its_frame():
    model = Nest().eval()
    x = torch.randn(2, 4)
    with record(model) as trace:
        with pytest.raises(RuntimeError):
            model.outer.run(0, lambda rows: rows @ torch.zeros(7, 7), torch.ones(2), x, otherwise=x)
        assert trace.frames == []


def test_the_repr_tells_the_mean_keep():
    model = skip(nn.Linear(4, 4)).eval()
    model.gate.rule.at = float("-inf")
    with record(model) as trace:
        model(torch.randn(2, 4))
    assert repr(trace) == "Trace(1 decisions; mean keep {'': 1.0})"


@given(st.integers(0, 5), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_two_frames_made_one_take_home_what_both_do(rows, rest, seed):
    outer = keeps((rows,), seed)
    taken = outer.nonzero().squeeze(1)
    lead = (len(taken), *rest)
    inner = keeps(lead, seed + 1).flatten()
    first = Frame(None, range(1), (rows,), taken, None, True)
    second = Frame(None, range(1), lead, inner.nonzero().squeeze(1), None, True)
    seen = torch.rand(len(second.taken), 2)
    assert torch.equal(first.with_inner(second).home(seen), first.home(second.home(seen)))


class Steps(Halt):
    """So many steps, of which rows leave one after another; a layer in each."""

    def __init__(self, steps) -> None:
        super().__init__()
        self.steps, self.inside = steps, skip(nn.Linear(4, 4))

    def start(self, x):
        return x

    def step(self, k, state):
        return state + 1, self.inside(state)

    def score(self, k, state, answer):
        return state[:, :1]

    def should_continue(self, k, score):
        return (score < self.steps).to(score)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_halt_of_many_steps_is_heard_in_time_linear_in_them(sparse, monkeypatch):
    count, home = [], Frame.home
    monkeypatch.setattr(Frame, "home", lambda frame, keep: count.append(1) or home(frame, keep))
    model, steps = execute(Steps(40).eval(), sparse=sparse), 40
    x = torch.arange(0.0, 8.0)[:, None] * torch.ones(4) * 5
    with torch.no_grad(), record(model) as trace:
        model(x)
    assert len(trace.calls) == 2 * steps - 1 >= len(count), "a keep goes home once, however deep it was made"
    for k, keep in enumerate(trace["inside"][1:], start=1):
        arrived = (x[:, :1] + k < steps).double()
        assert torch.equal(keep.double(), arrived * keep) and keep.shape == (8, 1)
    last = trace.calls[-1]
    assert last.within == tuple(("", k) for k in range(steps - 1)) and last.innermost == ("", steps - 2)
    assert last.around == {"": steps - 2} and trace.calls[0].within == () and trace.calls[0].innermost is None


class TwoExits(ThresholdHalt):
    """Two steps; the score is the first feature."""

    def __init__(self, threshold) -> None:
        super().__init__(2, threshold=threshold)

    def start(self, x):
        return x

    def step(self, k, state):
        return state, state + k

    def score(self, k, state, answer):
        return state[:, :1]


def test_a_full_pass_has_an_answer_per_step_and_a_decision_per_step_but_the_last():
    halt = TwoExits(0.0).train()
    with record(halt) as trace:
        halt(x := torch.randn(3, 4))
    calls, answers = trace.full_pass("")
    assert [call.keep.shape for call in calls] == [(3, 1)]
    assert torch.equal(answers[0], x) and torch.equal(answers[1], x + 1)


@pytest.mark.parametrize("passes", [0, 2])
def test_a_full_pass_is_one_pass(passes):
    halt = TwoExits(0.0).train()
    with record(halt) as trace:
        for _ in range(passes):
            halt(torch.randn(3, 4))
    with pytest.raises(StructureError, match="expected one pass"):
        trace.full_pass("")


@pytest.mark.parametrize("scores", [[1.0, 1.0], [-1.0, 1.0]])
def test_a_full_pass_has_every_row_at_every_step(scores):
    halt, x = TwoExits(0.0).eval(), torch.tensor(scores)[:, None]
    with record(execute(halt, sparse=False)) as trace:
        halt(x)
    assert len(trace.full_pass("")[1]) == 2
    with record(execute(halt, sparse=True)) as trace:
        halt(x)
    with pytest.raises(StructureError, match="use train mode"):
        trace.full_pass("")


def test_a_full_pass_has_the_rows_of_the_batch():
    halt = TwoExits(0.0).train()
    with record(halt) as trace:
        halt(torch.randn(3, 4))
    trace.full_pass("", 3)
    with pytest.raises(StructureError, match="use train mode"):
        trace.full_pass("", 4)
