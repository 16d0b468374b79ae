"""The sparse form beside autocast and gradients: as the dense form, for every layer of the law battery."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dynanet.core.dynamic import everything, execute, forced
from dynanet.testing import random_decisions
from tests.mechanisms.test_laws import LAYERS, drawn


def nothing(decision):
    return torch.zeros_like(decision.keep)


def some(decision):
    """Another part of every row's units; not by their scores, which differ between dtypes."""
    numbers = torch.arange(decision.keep.numel()).reshape(decision.keep.shape)
    return (torch.sin(numbers * 12.9) > -0.2).to(decision.keep)


# Rows that are left out have no numbers in the sparse form of these, so that `some` would mean others there.
BY_SCORE = ("token", "mixture", "scene")


def tensors(answer):
    return [t for t in tree_leaves(answer) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def flat(decide):
    return decide.__name__


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("decide", [everything, nothing, some], ids=flat)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_under_autocast(name, decide, frozen):
    make, x = drawn(name)
    model = make(lambda unit: unit).eval().requires_grad_(not frozen)
    if decide is some and name.startswith(BY_SCORE):
        pytest.skip("decisions of rounded scores")
    with torch.autocast("cpu", dtype=torch.bfloat16), forced(model, decide):
        dense, sparse = (tensors(execute(model, sparse=sparse)(x)) for sparse in (False, True))
    for a, b in zip(dense, sparse, strict=True):
        torch.testing.assert_close(b.float(), a.float(), rtol=0.05, atol=0.2)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("decide", [everything, nothing, random_decisions(1)], ids=flat)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_to_the_input(name, decide, frozen):
    make, x = drawn(name)
    model = make(lambda unit: unit).eval().requires_grad_(not frozen)
    found = []
    for sparse in (False, True):
        given = x.clone().requires_grad_()
        with forced(execute(model, sparse=sparse), decide):
            total = sum(t.sin().sum() for t in tensors(model(given)))
        gradient = torch.autograd.grad(total, given, allow_unused=True)[0] if total.requires_grad else None
        found.append(torch.zeros_like(x) if gradient is None else gradient)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
