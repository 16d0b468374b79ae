"""Anytime prediction, and the random-exit baseline that a frontier must beat."""

import numpy as np

from dynanet.calibrate.budgeted import Outcome
from dynanet.calibrate.table import ExitTable


def anytime_curve(table: ExitTable) -> list[Outcome]:
    """The outcome of every exit if all samples leave there, exits worse than earlier ones included.

    MSDNet's anytime curve (Huang et al. 2018, arXiv:1703.09844, section 4.2).
    """
    return [random_exits(table, share) for share in np.eye(table.exits)]


def random_exits(table: ExitTable, share: np.ndarray) -> Outcome:
    """The expected outcome of samples that are assigned to exits at random: the baseline for confidences.

    Args:
        table: of held-out or test data.
        share: (K,) of the samples that leave at every exit, adds up to 1; for example of an `Outcome`.
    """
    return Outcome(
        macs=float(share @ table.mean_macs),
        ms=None if table.ms is None else float(share @ table.ms),
        accuracy=float(share @ table.accuracy),
        share=share,
    )
