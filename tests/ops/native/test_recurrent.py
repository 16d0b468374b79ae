"""Recurrent layers in one native call: states, decisions, traces and MACs are those of torch."""

import copy

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import InputError
from dynanet.core.macs import CountMacs
from dynanet.data.ragged import Sequences
from dynanet.gates.rules import Threshold, TopK
from dynanet.mechanisms.skim import Skim
from dynanet.mechanisms.update_skip import UpdateSkip
from dynanet.ops.native import library, recurrent
from dynanet.session import Session

quick = hypothesis.settings(
    deadline=None, max_examples=15, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def skipping(kind=nn.GRUCell, inputs=3, hidden=20, **options):
    torch.manual_seed(0)
    layer = UpdateSkip(kind(inputs, hidden), inputs, hidden, **options)
    nn.init.constant_(layer.delta.bias, -0.7)
    nn.init.normal_(layer.delta.weight, std=3 * hidden**-0.5)
    return layer.eval().requires_grad_(False)


def skimming(kind=nn.GRUCell, inputs=3, hidden=20, skimmed=6, rule=None, **options):
    torch.manual_seed(0)
    cells = kind(inputs, hidden), kind(inputs + hidden - skimmed, skimmed)
    layer = Skim(*cells, inputs, hidden, skimmed, rule, reading=0.1, **options)
    nn.init.normal_(layer.gate.scorer.weight)
    return layer.eval().requires_grad_(False)


MAKERS = {"update skip": skipping, "skim": skimming}
KINDS = (nn.GRUCell, nn.LSTMCell)


def batch(rows=5, steps=9, inputs=3):
    torch.manual_seed(1)
    lengths = torch.randint(1, steps + 1, (rows,))
    return Sequences(torch.randn(rows, steps, inputs), lengths)


@pytest.fixture
def ran(kernels, monkeypatch):
    """The native calls."""
    names, chosen = [], library.chosen()
    for name in ("update_skip", "skim"):
        kernel = getattr(chosen, name)
        monkeypatch.setattr(chosen, name, lambda *a, n=name, kernel=kernel: (names.append(n), kernel(*a))[1])
    return names


def both(layer, x):
    """(answer, trace, MACs) of torch's dense form, and of the sparse one."""
    found = []
    for sparse in (False, True):
        with torch.no_grad(), record(execute(layer, sparse=sparse)) as trace, CountMacs(trace) as count:
            found.append((layer(x), trace, count.total))
    return found


@quick
@hypothesis.given(
    st.sampled_from(list(MAKERS)), st.sampled_from(KINDS), st.booleans(), st.booleans(),
    st.integers(1, 30), st.integers(1, 12), st.integers(1, 6), st.integers(2, 70),
)  # fmt: skip
def test_answers_traces_and_macs_are_those_of_torch(ran, name, kind, every_step, biased, rows, steps, inputs, hidden):
    def cell(*sizes):
        return kind(*sizes, bias=biased)

    options = {"skimmed": 1 + hidden // 3} if name == "skim" else {}
    layer = MAKERS[name](kind, inputs, hidden, every_step=every_step, **options)
    for child in [c for c in layer.modules() if isinstance(c, nn.RNNCellBase) and not biased]:
        child.bias_ih = child.bias_hh = None
    x, cost = batch(rows, steps, inputs), CostModel(layer, torch.randn(1, steps, inputs))
    del ran[:]
    (expected, dense, _), (answer, sparse, macs) = both(layer, x)
    assert ran == [name.replace(" ", "_")]
    ours, theirs = (torch.stack(trace[""]) for trace in (sparse, dense))
    alike = (ours == theirs).flatten(2).all(2).all(0)  # what lies next to a threshold may round apart
    assert alike.float().mean() >= 0.9
    torch.testing.assert_close(answer[alike], expected[alike], rtol=1e-4, atol=1e-5)
    assert macs == pytest.approx(float(cost.spent(sparse).sum()))
    for t, (a, b) in enumerate(zip(dense.calls, sparse.calls, strict=True)):
        there = alike & (t < x.lengths)
        torch.testing.assert_close(b.decision.score[there], a.decision.score[there], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_session_makes_one_call(name, kind, ran):
    layer, x = MAKERS[name](kind), batch().x
    session = Session(nn.Sequential(layer, nn.Linear(20, 2)), x, engines="eager", batches=(1,))
    del ran[:]
    answer = session(x)
    assert ran == [name.replace(" ", "_")] and len(session.engines()) == 1, "of the head alone"
    torch.testing.assert_close(answer, execute(session.model, sparse=False)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_rows_do_not_see_each_other(name, kernels):
    layer, x = execute(MAKERS[name](), sparse=True), batch(40)
    alone = [layer(Sequences(x.x[i : i + 1], x.lengths[i : i + 1])) for i in range(40)]
    torch.testing.assert_close(layer(x), torch.cat(alone), rtol=1e-5, atol=1e-6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.testing.assert_close(layer(x), torch.cat(alone), rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(threads)
    assert layer(x.x[:0]).shape == (0, 20)


@pytest.mark.parametrize("name", MAKERS)
def test_changed_weights_are_noticed_and_hooks_heard(name, ran):
    layer, x = MAKERS[name](), batch()
    both(layer, x)
    cell = layer.cell if name == "update skip" else layer.big
    cell.weight_hh.mul_(-2)
    for change in (lambda: None, lambda: setattr(cell, "bias_hh", nn.Parameter(torch.ones(60), requires_grad=False))):
        change()
        del ran[:]
        (expected, dense, _), (answer, sparse, _) = both(layer, x)
        assert ran and torch.equal(torch.stack(dense[""]), torch.stack(sparse[""]))
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)
    del ran[:]
    heard = []
    cell.register_forward_hook(lambda *_: heard.append(1))
    execute(layer, sparse=True)(x)
    assert heard and not ran


@pytest.mark.parametrize("name", MAKERS)
def test_what_stays_with_torch(name, ran):
    x = batch()
    trained, exact = MAKERS[name]().requires_grad_(True), MAKERS[name]().double()
    with torch.no_grad():
        execute(trained, sparse=True)(x)
    execute(exact, sparse=True)(Sequences(x.x.double(), x.lengths))
    with forced(layer := execute(MAKERS[name](), sparse=True), lambda d: torch.ones_like(d.keep)):
        layer(x)
    layer(Sequences(x.x.clone().requires_grad_(), x.lengths))
    execute(MAKERS[name](nn.RNNCell), sparse=True)(x)
    assert not ran
    execute(copy.deepcopy(layer), sparse=True)(x)
    assert ran


def test_the_rule_decides(ran):
    x = batch()
    shares = []
    for at in (-9.0, 0.3, 9.0):
        (_, dense, _), (_, sparse, _) = both(skimming(rule=Threshold(at)), x)
        assert torch.equal(torch.stack(sparse[""]), torch.stack(dense[""]))
        shares.append(float(torch.stack(sparse[""])[..., 0].sum()))
    assert ran and shares[0] == x.lengths.sum() > shares[1] > shares[2] == 0
    del ran[:]
    both(skimming(rule=TopK(1)), x)
    assert not ran


@pytest.mark.parametrize("name", MAKERS)
def test_nan_and_large_numbers(name, kernels):
    layer, x = execute(MAKERS[name](nn.LSTMCell), sparse=True), batch(6)
    clean = layer(x)
    x.x[2, 0, 0], x.x[4] = torch.nan, 1e30
    answer = layer(x)
    assert answer[2].isnan().any() and not answer[4].isnan().any()
    torch.testing.assert_close(answer[[0, 1, 3, 5]], clean[[0, 1, 3, 5]], rtol=1e-5, atol=1e-6)


def test_what_would_be_read_out_of_bounds(kernels):
    layer, x = skipping(), batch()
    ready = recurrent.PackedCells().of([layer.cell], layer.delta)
    for lengths in (torch.tensor([10, 1, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 1]), torch.ones(4, dtype=torch.long)):
        with pytest.raises(ValueError, match="native kernel got"):
            recurrent.update_skip(x.x, lengths, ready, every_step=False)
    with pytest.raises(ValueError, match="packed weights of shape"):
        recurrent.update_skip(x.x[..., :2], x.lengths, ready, every_step=False)
    with pytest.raises(InputError):
        execute(layer, sparse=True)(Sequences(x.x, torch.tensor([10, 1, 1, 1, 1])))
