import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynanet.core.dynamic import everything, execute, forced, record
from dynanet.core.errors import StructureError
from dynanet.core.halt import Halt


class Count(Halt):
    """Adds 1 per step; a row goes on while its first feature exceeds the step. The state is a pytree."""

    def __init__(self, steps=4) -> None:
        super().__init__()
        self.steps, self.ran = steps, []

    def start(self, x):
        return {"wanted": x, "done": torch.zeros_like(x), "note": None}

    def step(self, k, state):
        self.ran.append((k, state["wanted"].shape[0]))
        done = state["done"] + 1
        return {**state, "done": done}, (done, state["wanted"] * 0 + k)

    def score(self, k, state, answer):
        return state["wanted"][:, :1]

    def should_continue(self, k, score):
        return (score > k + 1).to(score.dtype)


def wanted(*steps):
    return torch.tensor(steps, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("limit", [None, 1, 2, 3, 4, 9])
@given(st.lists(st.integers(1, 6), max_size=6))
@settings(max_examples=15, deadline=None)
def test_a_row_answers_from_the_step_at_which_it_left_and_no_later_than_the_limit(sparse, limit, steps):
    halt, x = execute(Count().eval(), sparse=sparse), wanted(*steps)
    halt.limit = limit
    done, step = halt(x)
    expected = x.clamp(1, min(4, limit or 4)).reshape(-1, 1)
    assert torch.equal(done, expected) and torch.equal(step, expected - 1)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_limit_holds_even_when_all_is_forced_on(sparse):
    halt = execute(Count().eval(), sparse=sparse)
    halt.limit = 2
    with forced(halt, everything), record(halt) as trace:
        done, _ = halt(wanted(1, 9, 9))
    assert done.flatten().tolist() == [2, 2, 2]
    assert [k for k, _ in halt.ran] == [0, 1] and len(trace[""]) == 1


def test_the_limit_holds_in_training_too():
    halt = Count().train()
    halt.limit = 3
    halt(wanted(9, 9))
    assert [k for k, _ in halt.ran] == [0, 1, 2]


def test_a_limit_below_one_is_refused():
    halt = Count()
    halt.limit = 0
    with pytest.raises(StructureError, match="limit is 0"):
        halt(wanted(1))


def test_rows_that_left_are_not_computed():
    halt = execute(Count().eval(), sparse=True)
    halt(wanted(3, 1, 2, 1, 1))
    assert halt.ran == [(0, 5), (1, 2), (2, 1)], "and the fourth step does not run at all"
    dense = execute(Count().eval(), sparse=False)
    dense(wanted(3, 1, 2, 1, 1))
    assert dense.ran == [(k, 5) for k in range(4)]


def test_an_empty_batch_runs_one_step_only():
    halt = execute(Count().eval(), sparse=True)
    done, step = halt(wanted().reshape(0, 1))
    assert done.shape == step.shape == (0, 1) and halt.ran == [(0, 0)]


def test_the_trace_hears_every_decision_in_the_whole_batch_and_every_answer():
    x = wanted(3, 1, 2, 1)
    traces = []
    for sparse in (False, True):
        halt = execute(Count().eval(), sparse=sparse)
        with record(halt) as trace:
            halt(x)
        traces.append(trace)
        keeps = torch.cat(trace[""], 1).tolist()
        assert [row[:3] for row in keeps] == [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
        assert [call.first for call in trace.calls] == [0, 1, 2]
        assert [call.within for call in trace.calls] == [(), (("", 0),), (("", 0), ("", 1))]
    dense, sparse = traces
    assert [a[0].shape[0] for a in dense.answers[""]] == [4, 4, 4, 4]
    assert [a[0].shape[0] for a in sparse.answers[""]] == [4, 2, 1], "the rows that reached the step"


def test_frames_are_closed_after_a_pass():
    halt = execute(Count().eval(), sparse=True)
    with record(halt) as trace:
        halt(wanted(3, 1))
        assert trace.frames == []
        halt(wanted(3, 1))
    assert trace.calls[3].within == ()


def test_answers_lists_every_step_for_every_row_whatever_the_scores_say():
    halt, x = execute(Count().eval(), sparse=True), wanted(1, 1, 4)
    answers = halt.answers(x)
    assert [done.flatten().tolist() for done, _ in answers] == [[k, k, k] for k in (1, 2, 3, 4)]
    with forced(halt, everything), record(halt) as trace:
        halt(x)
    for (done, step), (d, s) in zip(answers, trace.answers[""], strict=True):
        assert torch.equal(done, d) and torch.equal(step, s)


def test_soft_decisions_weigh_the_answers_of_all_steps():
    """keep = p at every step: answer = (1 - p) (a_0 + p a_1 + p^2 a_2) + p^3 a_3, and the gradient of p is its own."""

    class Sigmoid(Count):
        def __init__(self, p) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor(p, dtype=torch.float64))

        def should_continue(self, k, score):
            return self.p.expand_as(score)

    halt = Sigmoid(0.3).train()
    answer, _ = halt(wanted(1, 1).double())
    p = halt.p
    expected = (1 - p) * (1 + 2 * p + 3 * p**2) + 4 * p**3
    assert torch.allclose(answer, expected.expand(2, 1), rtol=1e-12)
    (answer[0] - expected).backward()
    assert abs(p.grad) < 1e-12


def test_a_trace_in_training_carries_the_gradient_of_depth():
    class Sigmoid(Count):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def should_continue(self, k, score):
            return self.p.expand_as(score)

    halt = Sigmoid().train()
    with record(halt) as trace:
        halt(wanted(1).double())
    torch.stack(trace[""]).sum().backward()
    assert halt.p.grad.item() == pytest.approx(1 + 2 * 0.5 + 3 * 0.25), "keeps are p, p^2, p^3"
