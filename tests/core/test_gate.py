import pytest
import torch
from torch import nn

from dynanet.core.errors import StructureError
from dynanet.core.gate import Gate
from dynanet.gates.rules import Sigmoid, Threshold


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_a_gate_answers_the_rule_of_its_scores_and_keeps_the_scores():
    scorer = nn.Linear(3, 4)
    x = torch.randn(5, 7, 3)
    decision = Gate(scorer, Threshold(0.2), units=4)(x)
    assert torch.equal(decision.score, scorer(x))
    assert torch.equal(decision.keep, (scorer(x) > 0.2).float())


def test_modes_reach_the_rule():
    gate = Gate(nn.Linear(3, 1), Sigmoid())
    x = torch.randn(50, 3)
    assert not set(gate.train()(x).keep.flatten().tolist()) <= {0.0, 1.0}
    assert set(gate.eval()(x).keep.flatten().tolist()) <= {0.0, 1.0}


def test_one_score_per_unit_is_demanded():
    gate = Gate(nn.Linear(3, 2), Threshold(), units=3)
    with pytest.raises(StructureError, match=r"\(5, 2\).*must be 3"):
        gate(torch.randn(5, 3))
