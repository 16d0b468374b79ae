"""Load balancing: losses that spread rows over experts, read off the trace, and how uneven the loads are.

objective = CrossEntropy() + 0.01 * LoadBalance() + 0.001 * RouterZ()
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynanet.core.decision import Decision
from dynanet.core.errors import StructureError
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace


@dataclass(frozen=True)
class LoadBalance(Objective):
    """E * sum over experts of f * P (Switch: Fedus et al. 2022, arXiv:2101.03961, eq. 4-6), summed over layers.

    f is the share of choices that went to an expert, P the mean probability that the router gave it. Equal loads give
    1 per layer, all rows in one expert up to E. The gradient flows through P. Usual weight 0.01. With more than one
    choice per row f counts all of them; with `BatchCoupledTopK` it counts those that were served. Rows that no expert
    served and padding are left out, where Switch counts unserved rows in P.

    Args:
        layers: names of the layers to balance; None: all that decide among several units. Name them in a model that
            also has other such layers (blocks of neurons, groups of channels).
    """

    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", None if self.layers is None else tuple(self.layers))

    def __call__(self, answer: object, y: object, trace: Trace) -> Tensor:
        """Over all rows of the layers' calls.

        Raises:
            StructureError: none of the layers decided in this pass.
        """
        return _sum_over_layers(trace, self.layers, _balance)


@dataclass(frozen=True)
class RouterZ(Objective):
    """The mean squared logsumexp of the router's scores (ST-MoE: Zoph et al. 2022, arXiv:2202.08906, eq. 5).

    Summed over layers. It keeps scores small, where rounding harms them less. Usual weight 0.001.

    Args:
        layers: as in `LoadBalance`.
    """

    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", None if self.layers is None else tuple(self.layers))

    def __call__(self, answer: object, y: object, trace: Trace) -> Tensor:
        """Over all rows of the layers' calls.

        Raises:
            StructureError: none of the layers decided in this pass.
        """
        return _sum_over_layers(trace, self.layers, _z)


def load(trace: Trace, layer: str) -> Tensor:
    """The share of a layer's choices that went to each of its units, (units,); 0 where nothing was chosen.

    Raises:
        StructureError: the layer did not decide in this pass.
    """
    kept = torch.stack([_rows(d)[0].sum(0) for d in _decisions(trace, (layer,))[layer]]).sum(0).detach()
    return kept / kept.sum().clamp(min=1)


def load_variation(trace: Trace, layers: Sequence[str] | None = None) -> dict[str, float]:
    """The coefficient of variation of the loads, by layer.

    0 where units are chosen equally often, sqrt(E - 1) where all rows choose the same one. Meaningful over many rows:
    a few cannot spread over many experts.

    Raises:
        StructureError: none of the layers decided in this pass.
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
    """(keep, scores), each (rows, units), and which rows keep anything, (rows, 1): padding does not."""
    keep = decision.keep.flatten(0, -2)
    score = decision.score.flatten(0, -2)
    return keep, score, (keep.detach() > 0).any(1, keepdim=True).to(score.dtype)


def _sum_over_layers(trace: Trace, layers: Sequence[str] | None, term: Callable[[Decision], Tensor]) -> Tensor:
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
            f"expected decisions of {missing or 'a layer with several units'} in the trace, found those of "
            f"{trace.keys()}; run the model inside `with record(model) as trace`, and name layers that route"
        )
    return found
