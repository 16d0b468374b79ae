"""Keeping experts busy: losses that spread rows over experts, read off the trace, and the figure that tells a collapse.

objective = CrossEntropy() + 0.01 * LoadBalance() + 0.001 * RouterZ()
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynanet.core.decision import Decision
from dynanet.core.errors import StructureError
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace


class LoadBalance(Objective):
    """E * sum over experts of f * P (Switch: Fedus et al. 2022, arXiv:2101.03961, eq. 4-6), summed over layers.

    f is the share of choices that went to an expert, P the mean probability that the router gave it. Equal loads give
    1 per layer, all rows in one expert up to E. The gradient flows through P. Usual weight 0.01. With more than one
    choice per row f counts all of them; with `BatchCoupledTopK` it counts those that were served, and rows that
    were not served at all are left out, as padding is, where Switch counts them in P.

    Args:
        layers: names of the layers that are meant; None: all that decide among several units. Name them in a model
            that also has other such layers (blocks of neurons, groups of channels).
    """

    def __init__(self, layers: Sequence[str] | None = None) -> None:
        self.layers = None if layers is None else tuple(layers)

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over all rows that the layers saw.

        Raises:
            StructureError: there is no such layer in the trace.
        """
        return _sum_over_layers(trace, self.layers, _balance)

    def __repr__(self) -> str:
        return f"LoadBalance({self.layers})"


class RouterZ(Objective):
    """The mean squared logsumexp of the router's scores (ST-MoE: Zoph et al. 2022, arXiv:2202.08906, eq. 5), summed
    over layers: keeps scores small, where rounding harms them less. Usual weight 0.001.

    Args:
        layers: as in `LoadBalance`.
    """

    def __init__(self, layers: Sequence[str] | None = None) -> None:
        self.layers = None if layers is None else tuple(layers)

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over all rows that the layers saw.

        Raises:
            StructureError: there is no such layer in the trace.
        """
        return _sum_over_layers(trace, self.layers, _z)

    def __repr__(self) -> str:
        return f"RouterZ({self.layers})"


def load(trace: Trace, layer: str) -> Tensor:
    """The share of a layer's choices that went to each of its units, (units,); 0 where nothing was chosen.

    Raises:
        StructureError: there is no such layer in the trace.
    """
    kept = torch.stack([_rows(d)[0].sum(0) for d in _decisions(trace, (layer,))[layer]]).sum(0).detach()
    return kept / kept.sum().clamp(min=1)


def load_variation(trace: Trace, layers: Sequence[str] | None = None) -> dict[str, float]:
    """The coefficient of variation of the loads, by layer: 0 where units are chosen equally often, sqrt(E - 1) where
    all rows choose the same one. Over many rows: a handful cannot spread over many experts.

    Raises:
        StructureError: there is no such layer in the trace.
    """
    found = {}
    for name in _decisions(trace, layers):
        share = load(trace, name)
        found[name] = float(share.std(correction=0) / share.mean().clamp(min=torch.finfo(share.dtype).tiny))
    return found


def _balance(decision: Decision) -> Tensor:
    keep, score, there = _rows(decision)
    share = keep.sum(0) / keep.sum().clamp(min=1)
    probability = (score.softmax(1) * there).sum(0) / there.sum().clamp(min=1)
    return keep.shape[1] * (share.detach() * probability).sum()


def _z(decision: Decision) -> Tensor:
    _, score, there = _rows(decision)
    return (score.logsumexp(1).square() * there[:, 0]).sum() / there.sum().clamp(min=1)


def _rows(decision: Decision) -> tuple[Tensor, Tensor, Tensor]:
    """keep and scores as (rows, units), and which rows count, (rows, 1): padding, which keeps nothing, does not."""
    keep, score = decision.keep.flatten(0, -2), decision.score.flatten(0, -2)
    return keep, score, (keep.detach() > 0).any(1, keepdim=True).to(score.dtype)


def _sum_over_layers(trace: Trace, layers: Sequence[str] | None, term: Any) -> Tensor:
    """The mean over a layer's calls, summed over layers."""
    means = [torch.stack([term(d) for d in calls]).mean() for calls in _decisions(trace, layers).values()]
    return torch.stack(means).sum()


def _decisions(trace: Trace, layers: Sequence[str] | None) -> dict[str, list[Decision]]:
    found: dict[str, list[Decision]] = {}
    for call in trace.calls:
        chosen = call.decision.score.shape[-1] > 1 if layers is None else call.name in layers
        if chosen:
            found.setdefault(call.name, []).append(call.decision)
    missing = [name for name in layers or () if name not in found]
    if missing or not found:
        raise StructureError(
            f"{missing or 'a layer that decides among several units'} was expected in the trace, and it heard "
            f"{trace.keys()}; name layers that route, and record the pass"
        )
    return found
