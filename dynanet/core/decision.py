"""A Decision says which units run for which rows."""

from typing import NamedTuple

from torch import Tensor


class Decision(NamedTuple):
    """Which units run for which rows, and the scores that said so.

    Attributes:
        keep: (rows..., units). 1 where the unit runs for the row, 0 where it does not; in training a soft rule may
            put anything between.
        score: what the scorer answered, (rows..., units) or (rows..., 1). Kept for calibration.
    """

    keep: Tensor
    score: Tensor
