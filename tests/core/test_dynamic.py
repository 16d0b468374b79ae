import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, everything, execute, forced, layers, record


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class RelaxedTopK(Dynamic):
    """Adds each of three units where the input says so; the first is pinned, and rows below -9 are not present."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.calls = 0

    def forward(self, x):
        score = x
        pinned = torch.zeros_like(x)
        pinned[..., 0] = 1
        present = (x[..., :1] > -9).to(x)
        keep = self.tap(Decision((score > 0).to(x), score), pinned=pinned, present=present).keep
        y = torch.zeros_like(x)
        for u, unit in enumerate(self.units):
            y = y + self.run(u, lambda t, unit=unit: self._called(unit, t), keep[..., u], x, torch.zeros_like(x))
        return y

    def _called(self, unit, t):
        self.calls += 1
        return unit(t)


def test_only_a_keep_that_is_pinned_or_gone_withstands_force():
    model, x = RelaxedTopK().eval(), torch.tensor([[1.0, 1, -1], [-1, -1, -1], [-10, 1, 1]])
    cases = [
        (None, [[1, 1, 0], [1, 0, 0], [0, 0, 0]]),
        (everything, [[1, 1, 1], [1, 1, 1], [0, 0, 0]]),
        (lambda d: torch.zeros_like(d.keep), [[1, 0, 0], [1, 0, 0], [0, 0, 0]]),
    ]
    for force, expected in cases:
        with record(model) as trace:
            if force is None:
                model(x)
            else:
                with forced(model, force):
                    model(x)
        assert trace[""][0].tolist() == expected


def test_force_sees_the_scores_and_its_answer_takes_the_dtype_of_keep():
    model, score = RelaxedTopK(), torch.randn(8, 3)
    with forced(model, lambda d: d.score < 0):
        keep = model.apply_override(Decision(torch.zeros(8, 3), score)).keep
    assert keep.dtype == score.dtype and torch.equal(keep, (score < 0).float())


def test_forces_nest_and_an_exception_restores_what_was_before():
    model = nn.Sequential(RelaxedTopK(), RelaxedTopK())

    def none(decision):
        return torch.zeros_like(decision.keep)

    with forced(model, everything):
        with pytest.raises(ZeroDivisionError), forced(model[0], none):
            assert model[0].force is none and model[1].force is everything
            raise ZeroDivisionError
        assert model[0].force is everything and model[1].force is everything
    assert model[0].force is None and model[1].force is None


@given(st.lists(st.integers(0, 4), min_size=1, max_size=2), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_both_forms_answer_the_same(lead, seed):
    torch.manual_seed(seed)
    model, x = RelaxedTopK().double().eval(), torch.randn(*lead, 3, dtype=torch.float64)
    dense = execute(model, sparse=False)(x)
    sparse = execute(model, sparse=True)(x)
    assert dense.shape == sparse.shape == x.shape
    assert torch.allclose(dense, sparse, rtol=1e-12, atol=1e-12)


def test_a_unit_that_no_row_keeps_is_not_called():
    model = execute(RelaxedTopK().eval(), sparse=True)
    model(-torch.ones(4, 3))
    assert model.calls == 1, "the pinned unit alone"
    model(-torch.ones(0, 3))
    assert model.calls == 1, "no row, no call"
    execute(model, sparse=False)(-torch.ones(4, 3))
    assert model.calls == 4, "the dense form computes all"


def test_in_training_the_dense_form_runs_whatever_is_set():
    model = execute(RelaxedTopK().train(), sparse=True)
    assert not model.gathers
    model(-torch.ones(4, 3))
    assert model.calls == 3


def test_a_soft_keep_weighs_the_unit_and_gets_a_gradient():
    layer = RelaxedTopK()
    keep = torch.tensor([0.25, 0.0, 1.0], requires_grad=True)
    x = torch.randn(3, 3)
    y = layer.run(0, lambda t: 2 * t, keep, x, otherwise=-x)
    assert torch.allclose(y, (2 * keep - (1 - keep))[:, None] * x)
    y.sum().backward()
    assert torch.allclose(keep.grad, 3 * x.sum(1))


def test_only_is_run_opened_up():
    layer, x, keep = RelaxedTopK().eval(), torch.randn(5, 3), torch.tensor([1.0, 0, 1, 0, 0])
    for sparse in (False, True):
        execute(layer, sparse=sparse)
        with layer.only(1, keep) as kept:
            taken = kept.take(x)
            assert taken.shape[0] == (2 if sparse else 5)
            assert not kept.empty
            y = layer.units[1](taken)
        opened = kept.put(y, otherwise=x)
        assert torch.equal(opened, layer.run(1, layer.units[1], keep, x, otherwise=x))
        with layer.only(1, torch.zeros(5)) as kept:
            assert kept.empty == sparse


def test_pytrees_go_through_units():
    layer, keep = execute(RelaxedTopK().eval(), sparse=True), torch.tensor([0.0, 1, 0])
    x, h = torch.arange(3.0), torch.ones(3, 2)
    for sparse in (False, True):
        execute(layer, sparse=sparse)
        a, (b, none) = layer.run(
            0, lambda s: (s[0] + 10, (s[1] * 2, None)), keep, (x, h), otherwise=(x, (torch.zeros(3, 2), None))
        )
        assert a.tolist() == [0, 11, 2] and b.tolist() == [[0, 0], [2, 2], [0, 0]] and none is None


def test_a_price_is_linear_in_the_kept_rows():
    keep = torch.tensor([[[1.0, 0], [1, 1]], [[0, 0], [0.5, 0]]], requires_grad=True)
    spent = RelaxedTopK().price(keep, torch.tensor([10.0, 3.0], dtype=torch.float64))
    assert spent.tolist() == [23, 5]
    spent.sum().backward()
    assert keep.grad[0, 0].tolist() == [10, 3]


def test_layers_are_found_by_name_outermost_first():
    model = nn.Sequential(RelaxedTopK(), nn.Sequential(nn.ReLU(), RelaxedTopK()))
    model[0].units[1] = RelaxedTopK()
    assert list(layers(model)) == ["0", "0.units.1", "1.1"]
    assert list(layers(RelaxedTopK())) == [""]


def test_execute_switches_every_layer_and_answers_the_model():
    model = nn.Sequential(RelaxedTopK(), nn.Sequential(RelaxedTopK()))
    assert execute(model, sparse=True) is model
    assert [layer.sparse for layer in layers(model).values()] == [True, True]
