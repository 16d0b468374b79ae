"""Packed experts add what the experts would, or say that they cannot and add nothing."""

import copy

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from dynanet.core.macs import CountMacs
from dynanet.ops.native import library
from dynanet.ops.native.experts import PackedExperts
from tests.ops.native.drawing import close, drawn, quick


def expert(inputs=5, hidden=7, outputs=6, activation=nn.ReLU, bias=True):
    layers = nn.Linear(inputs, hidden, bias), activation(), nn.Linear(hidden, outputs, bias)
    return nn.Sequential(*layers).requires_grad_(False)


def experts(count=3, **sizes):
    torch.manual_seed(0)
    return nn.ModuleList(expert(**sizes) for _ in range(count))


def by_torch(answer, x, modules, keep, weight):
    with torch.no_grad():
        return answer + sum((keep * weight)[:, [i]] * module(x) for i, module in enumerate(modules))


def routed(rows, count=3, seed=0):
    return torch.ones(rows, 6), drawn(1, rows, 5), (drawn(seed, rows, count) > 0).float(), drawn(3, rows, count)


@quick
@hypothesis.given(
    st.integers(0, 20), st.integers(1, 5), st.integers(0, 99), st.sampled_from([nn.ReLU, nn.GELU, nn.Tanh]),
    st.booleans(),
)  # fmt: skip
def test_the_weighted_answers_of_kept_experts_are_added(kernels, rows, count, seed, activation, bias):
    modules = experts(count, activation=activation, bias=bias)
    answer, x, keep, weight = routed(rows, count, seed)
    expected = by_torch(answer, x, modules, keep, weight)
    with CountMacs() as macs:
        assert PackedExperts().add_(answer, x, modules, keep, weight)
    close(answer, expected)
    assert macs.total == keep.sum() * (5 * 7 + 7 * 6)


def swap_a_layer(modules):
    modules[1][2] = nn.Linear(7, 6).requires_grad_(False)


def swap_an_expert(modules):
    modules[2] = expert()


def change_a_weight(modules):
    modules[0][0].weight.mul_(-2)


def add_an_expert(modules):
    modules.append(expert())


@pytest.mark.parametrize("change", [swap_a_layer, swap_an_expert, change_a_weight, add_an_expert])
def test_changes_are_noticed(kernels, change):
    packed, modules = PackedExperts(), experts()
    answer, x, keep, weight = routed(9)
    assert packed.add_(answer.clone(), x, modules, keep, weight)
    change(modules)
    answer, x, keep, weight = routed(9, len(modules))
    expected = by_torch(answer, x, modules, keep, weight)
    assert packed.add_(answer, x, modules, keep, weight)
    close(answer, expected)


def another_size(modules):
    modules[1] = expert(hidden=8)


def another_activation(modules):
    modules[1] = expert(activation=nn.GELU)


def another_kind(modules):
    modules[1] = nn.Linear(5, 6).requires_grad_(False)


def weights_that_train(modules):
    modules.requires_grad_(True)


def a_hook(modules):
    modules[0][0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("change", [another_size, another_activation, another_kind, weights_that_train, a_hook])
def test_what_cannot_run_natively_adds_nothing(kernels, change):
    modules = experts()
    change(modules)
    answer, x, keep, weight = routed(9)
    assert not PackedExperts().add_(answer, x, modules, keep, weight)
    assert torch.equal(answer, torch.ones(9, 6))


def test_rows_that_do_not_fit_add_nothing(kernels):
    packed, modules = PackedExperts(), experts()
    answer, x, keep, weight = routed(9)
    for other, rows in ((answer, x[:, :4]), (answer[:, :5], x), (answer, x.double()), (answer[None], x[None])):
        assert not packed.add_(other, rows, modules, keep, weight)
    with library.using(""):
        assert not packed.add_(answer, x, modules, keep, weight)
    assert torch.equal(answer, torch.ones(9, 6))


def test_a_copy_packs_for_itself(kernels):
    packed, modules = PackedExperts(), experts()
    answer, x, keep, weight = routed(4)
    packed.add_(answer.clone(), x, modules, keep, weight)
    other = copy.deepcopy(packed)
    theirs = experts().requires_grad_(False)
    change_a_weight(theirs)
    expected = by_torch(answer, x, theirs, keep, weight)
    assert other.add_(answer, x, theirs, keep, weight)
    close(answer, expected)
