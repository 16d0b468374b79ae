"""The halting scores of adaptive computation time, read from a trace.

Graves 2016 (arXiv:1603.08983): a row stops at the first step at which its halting scores sum to about 1. A layer logs,
after every step but the last, which rows continue, and the sum of their scores so far.
"""

import torch
from torch import Tensor

from dynanet.core.errors import StructureError
from dynanet.core.trace import Call, Trace


def halting_calls(trace: Trace, name: str) -> list[Call]:
    """The decisions of one pass through a layer, each made for every row.

    Args:
        trace: of the pass.
        name: of the layer.

    Raises:
        StructureError: the layer ran several times, or rows did not reach it.
    """
    calls = trace.complete(name)
    if len({call.first for call in calls}) < len(calls):
        raise StructureError(f"{name!r} ran several times in this pass ({len(calls)} decisions); run it once")
    return calls


def halting_scores(calls: list[Call]) -> list[Tensor]:
    """The halting score of every step but the last, shaped as the score of its call."""
    sums = [call.decision.score for call in calls]
    return [total if k == 0 else total - sums[k - 1] for k, total in enumerate(sums)]


def ponder_cost(keeps: list[Tensor], scores: list[Tensor]) -> Tensor:
    """N + R, the number of steps and the remainder, averaged over rows.

    2 for the first step and the whole remainder; every further step adds 1 and takes its halting score from the
    remainder. N has no gradient, so that of the cost is -1 for every score before the last (Figurnov et al. 2017,
    arXiv:1612.02297, section 3.1).

    Args:
        keeps: by step but the last, 1 for the rows that continue.
        scores: the halting scores, of the same shapes.
    """
    cost = torch.full((), 2.0)
    for keep, score in zip(keeps, scores, strict=True):
        cost = cost + (keep.detach() * (1 - score)).mean()
    return cost
