"""Anytime prediction, and what exits are worth without looking at the sample: the lines a frontier must lie above."""

import numpy as np

from dynanet.calibrate.budgeted import Outcome
from dynanet.calibrate.table import ExitTable
from dynanet.core.errors import BudgetError


def anytime_curve(table: ExitTable) -> list[Outcome]:
    """Every exit alone: the accuracy of all samples there, at its cost. Exits worse than earlier ones are not hidden.

    MSDNet's anytime curve (Huang et al. 2018, arXiv:1703.09844, section 4.2).
    """
    return [random_exits(table, share) for share in np.eye(table.exits)]


def random_exits(table: ExitTable, share: np.ndarray) -> Outcome:
    """Samples drawn to their exits by lot, in expectation: what confidence is worth is the difference to this.

    Args:
        table: of held-out or test data.
        share: (K,) of the samples that leave at every exit, adds up to 1; say of an `Outcome`.
    """
    return Outcome(
        macs=float(share @ table.mean_macs),
        ms=None if table.ms is None else float(share @ table.ms),
        accuracy=float(share @ table.accuracy),
        share=share,
    )


def single_exit(table: ExitTable, macs: float) -> int:
    """The exit with the best accuracy among those that all samples can reach for this mean cost.

    Choose it on held-out data; read its accuracy off test data.

    Raises:
        BudgetError: not even the first is that cheap.
    """
    within = table.mean_macs <= macs * (1 + 1e-9)
    if not within.any():
        raise BudgetError(f"macs={macs:,.0f} is below the cheapest exit, {table.mean_macs.min():,.0f}")
    return int(np.flatnonzero(within)[np.argmax(table.accuracy[within])])
