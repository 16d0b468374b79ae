"""A stream answers every sample as it would be answered alone, in order, with batches kept full."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from dynanet.core.errors import InputError
from dynanet.session.session import Session
from tests.session.deployed import ROWS, make, rows


@pytest.fixture(scope="module")
def sessions():
    made = {}

    def get(name: str, engine: str):
        if name not in made:
            made[name] = make(name)
        if (name, engine) not in made:
            made[name, engine] = Session(made[name].model, made[name].x, engines=engine, batches=(8,))
        return made[name], made[name, engine]

    return get


def one_by_one(x) -> list:
    return [rows(x, i) for i in range(ROWS)]


def same(ours, theirs) -> None:
    (a, shape), (b, expected) = tree_flatten(ours), tree_flatten(theirs)
    assert shape == expected
    for t, e in zip(a, b, strict=True):
        assert t is e or torch.testing.assert_close(t, e, rtol=1e-3, atol=1e-3) is None


@pytest.mark.parametrize("name", ["msdnet", "skips in exits", "pytrees", "what came, handed on"])
@pytest.mark.parametrize("engine, batch", [("eager", n) for n in (1, 2, 7, 16, 64)] + [("onnxruntime", 7)])
def test_the_answers_of_single_samples_in_their_order(name, engine, batch, sessions):
    each, session = sessions(name, engine)
    answers = list(session.stream(one_by_one(each.x), batch=batch))
    assert len(answers) == ROWS
    for i, answer in enumerate(answers):
        same(answer, rows(session(rows(each.x, slice(i, i + 1))), 0))


def test_the_hard_cap_holds_here_too(sessions):
    each = make("pytrees")
    each.model.thresholds.fill_(torch.inf)
    each.model.limit = 2
    session = Session(each.model, each.x, engines="eager")
    assert not calls(session, lambda: list(session.stream(one_by_one(each.x), batch=8)))[2]
    same(list(session.stream(one_by_one(each.x), batch=8))[5], rows(session(each.x), 5))


def calls(session: Session, work) -> list[list[int]]:
    """Rows of every engine call, step by step."""
    met: list[list[int]] = [[] for _ in session.engines()]
    for engine, rows_met in zip(session.engines(), met, strict=True):
        engine.listener = lambda inputs, rows_met=rows_met: rows_met.append(inputs[0].shape[0])
    work()
    for engine in session.engines():
        engine.listener = None
    return met


def test_survivors_of_several_arrivals_merge(sessions):
    each, session = sessions("msdnet", "eager")
    x = each.x[torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))]
    groups = calls(session, lambda: [session(group) for group in x.split(8)])
    merged = calls(session, lambda: list(session.stream(one_by_one(x), batch=8)))
    for step, (without, with_refill) in enumerate(zip(groups, merged, strict=True)):
        assert sum(without) == sum(with_refill)  # the same rows get as far
        assert all(n == 8 for n in with_refill[:-1])  # full, but for what is left at the end
        assert len(with_refill) < len(without) if step else len(with_refill) == len(without)


@pytest.mark.parametrize("batch", [1, 4])
def test_answers_come_before_the_input_ends(batch, sessions):
    each, session = sessions("pytrees", "eager")
    taken = 0

    def endless() -> Iterator:
        nonlocal taken
        for i in itertools.count():
            taken += 1
            yield rows(each.x, i % ROWS)

    stream = session.stream(endless(), batch=batch)
    assert taken == 0
    first = list(itertools.islice(stream, 20))
    for i, answer in enumerate(first):
        same(answer, rows(session(rows(each.x, slice(i, i + 1))), 0))
    assert taken <= 20 + 4 * batch * session.model.steps


def test_no_samples_no_answers(sessions):
    assert list(sessions("pytrees", "eager")[1].stream([])) == []


def test_later_answers_leave_earlier_ones_alone(sessions):
    each, session = sessions("pytrees", "onnxruntime")
    stream = session.stream(one_by_one(each.x), batch=2)
    first = next(stream)
    kept = [t.clone() for t in tree_flatten(first)[0]]
    list(stream)
    assert all(torch.equal(a, b) for a, b in zip(tree_flatten(first)[0], kept, strict=True))


def test_a_model_without_steps_has_nothing_to_merge():
    session = Session(nn.Linear(3, 2), torch.zeros(1, 3), engines="eager")
    with pytest.raises(InputError, match="has no steps: call it"):
        session.stream([torch.zeros(3)])


@pytest.mark.parametrize("batch", [0, -3, 2.5])
def test_a_batch_is_a_number_of_rows(batch, sessions):
    with pytest.raises(InputError, match="batch is"):
        sessions("pytrees", "eager")[1].stream([], batch=batch)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda t: t.index_fill(0, torch.tensor([0]), torch.nan), "NaN"),
        (lambda t: t[:, :-1], "another size"),
        (lambda t: t[None], "5 axes"),
        (lambda t: t.double(), "float64"),
        (lambda t: {"image": t}, "dict"),
    ],
)
def test_a_sample_that_the_model_cannot_take(spoil, says, sessions):
    each, session = sessions("msdnet", "eager")
    samples: list[Tensor] = one_by_one(each.x)
    samples[6] = spoil(samples[6])
    stream = session.stream(samples, batch=4)
    with pytest.raises(InputError, match=f"sample 6 of the stream: .*{says}"):
        list(stream)
