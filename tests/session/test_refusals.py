"""What a session and a cost model refuse, by name: examples that a model cannot take, whatever its layers raise."""

import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.errors import REFUSALS, InputError, StructureError
from dynanet.session.session import Session


class Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


def eager(model, example):
    return Session(model, example, engines="eager")


BOTH = pytest.mark.parametrize("make", [eager, CostModel])


@BOTH
@pytest.mark.parametrize("kind", [*REFUSALS, KeyError, IndexError, ZeroDivisionError, NotImplementedError])
def test_whatever_layers_raise(make, kind):
    with pytest.raises(InputError, match=r"sample.* \(.+\)"):
        make(Raises(kind()), torch.randn(2, 3))
    with pytest.raises(InputError, match="the reason"):
        make(Raises(kind("the reason")), torch.randn(2, 3))


@BOTH
def test_our_own_errors_pass(make):
    with pytest.raises(StructureError, match="^mine$"):
        make(Raises(StructureError("mine")), torch.randn(2, 3))


@BOTH
def test_a_norm_that_needs_more_than_one_row(make):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)).eval()
    with pytest.raises(InputError, match="of 1 sample .*more than 1 value"):
        make(model, torch.randn(1, 6))


@BOTH
@pytest.mark.parametrize("example", [None, 3, [1.0, 2.0], (), "text", torch.tensor(1.0)])
def test_examples_without_samples(make, example):
    with pytest.raises(InputError, match="expected tensors with the samples as their first axis"):
        make(nn.Linear(3, 3), example)
