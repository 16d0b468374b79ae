import math

import numpy as np
import pytest

from dynanet.core.budget import Budget
from dynanet.core.errors import BudgetError, DynanetError


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"confidence": 0.9},
        {"macs": 0},
        {"macs": -1.0},
        {"macs": math.nan},
        {"ms": math.inf},
        {"cap_macs": -5},
        {"risk": 0},
        {"risk": 1},
        {"risk": 2},
        {"risk": math.nan},
        {"risk": 0.1, "confidence": 1.0},
        {"risk": 0.1, "confidence": None},
        {"macs": "1e6"},
        {"macs": True},
    ],
)
def test_a_budget_that_means_nothing_is_refused_in_one_line(asked):
    with pytest.raises(BudgetError) as said:
        Budget(**asked)
    assert isinstance(said.value, DynanetError)
    assert "\n" not in str(said.value)


def test_numbers_of_any_kind_become_floats_and_compare():
    assert Budget(macs=np.float32(8)) == Budget(macs=8) == Budget(macs=np.int64(8))
    assert type(Budget(macs=8).macs) is float


def test_the_repr_shows_what_was_asked_and_reads_back():
    for budget in (Budget(macs=2e6), Budget(risk=0.05, confidence=0.8), Budget(ms=1.5, cap_macs=9e6)):
        assert eval(repr(budget)) == budget
