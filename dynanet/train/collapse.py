"""Collapse: a gate that keeps nearly everything or nearly nothing, and units of which a few do all the work."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from dynanet.core.halt import Halt
from dynanet.core.trace import Call, Trace

RATES = (0.02, 0.98)  # outside, a gate has collapsed
SPREAD = 2.0  # above, units that compete for rows have collapsed: standard deviation over mean of their loads
ENOUGH = 200  # decisions; with fewer, a rate says little


class Load(NamedTuple):
    """What the units of a layer had to do.

    Attributes:
        kept: (units,) rows that kept each.
        rows: (units,) rows that were decided on; where units compete, those that kept any (padding keeps none).
        compete: every row keeps the same number of several units (top-k): how many they are says nothing, and how they
            are spread says all. A tensor of one bool.
        each: how many units a row asks for, if they compete. A tensor of one number.
    """

    kept: Tensor
    rows: Tensor
    compete: Tensor
    each: Tensor

    def __add__(self, other: "Load") -> "Load":  # type: ignore[override]
        more = other.kept.shape[0] - self.kept.shape[0]
        mine, others = _grown(self, max(0, more)), _grown(other, max(0, -more))
        return Load(mine.kept + others.kept, mine.rows + others.rows, mine.compete & others.compete, mine.each)

    def rate(self) -> float:
        """The share of decisions that kept."""
        return float(self.kept.sum() / self.rows.sum().clamp(min=1))

    def spread(self) -> float:
        """The coefficient of variation of the loads: 0 if all units work alike, (units - 1)^(1/2) if one does all."""
        load = self.kept / self.rows.clamp(min=1)
        return float(load.std(correction=0) / load.mean().clamp(min=1e-12))

    def most_spread(self) -> float:
        """What is too much: SPREAD, or less where few units compete and it could not be reached."""
        return min(SPREAD, 0.9 * max(self.kept.shape[0] / max(float(self.each), 1e-12) - 1, 0.0) ** 0.5)


def loads(trace: Trace) -> dict[str, Load]:
    """The load of every learnt gate's units, by layer.

    Learnt are gates in train mode whose scores or keep have a gradient; an exit that always goes on in training is no
    gate. What counts is what a layer decided for the rows it saw.
    """
    found: dict[str, Load] = {}
    names = {name: layer for layer, name in trace.names.items()}
    for call in trace.calls:
        layer, decision = names[call.name], call.decision
        scored = decision.score.requires_grad and not isinstance(layer, Halt)
        if layer.training and (decision.keep.requires_grad or scored):
            load = _load(call, names[call.name])
            found[call.name] = found[call.name] + load if call.name in found else load
    return found


def collapsed(found: dict[str, Load]) -> dict[str, str]:
    """What is wrong with which layer, in words; layers of which too few decisions are known are left out."""
    wrong = {}
    for name, load in found.items():
        if load.rows.sum() < ENOUGH:
            continue
        if bool(load.compete):
            if load.spread() > load.most_spread() > 0:
                wrong[name] = (
                    f"the units of {name!r} have collapsed: the coefficient of variation of their loads is "
                    f"{load.spread():.2f}, and the busiest took {float(load.kept.max() / load.kept.sum()):.0%} of the "
                    f"rows; raise the weight of the load-balancing loss"
                )
        elif not RATES[0] <= load.rate() <= RATES[1]:
            wrong[name] = (
                f"the gate of {name!r} has collapsed: it kept {load.rate():.1%} of its rows; change the weight of the "
                f"budget, start with a higher temperature, or warm up with every unit kept"
            )
    return wrong


class CollapseAlarm:
    """Warns once for every layer, with its name. `train.TrainingModule` has one; in a loop of your own, call `log` with
    every trace and `warn` after every epoch.
    """

    def __init__(self) -> None:
        self._found: dict[str, Load] = {}
        self._warned: set[str] = set()

    def log(self, trace: Trace) -> None:
        """One recorded pass."""
        for name, load in loads(trace).items():
            self._found[name] = self._found[name] + load if name in self._found else load

    def warn(self) -> None:
        """Name what has collapsed since the last time, unless it was named before. What had too few decisions to tell
        is counted on.
        """
        for name, words in collapsed(self._found).items():
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(words, stacklevel=2)
        self._found = {name: load for name, load in self._found.items() if load.rows.sum() < ENOUGH}


def _load(call: Call, layer: Module) -> Load:
    keep = call.decision.keep.detach().flatten(0, -2).float()  # (rows, columns); half precision cannot count to 32,769
    columns, per_row = keep.shape[-1], keep.sum(1)
    compete = torch.tensor(columns > 1, device=keep.device)
    each = getattr(getattr(getattr(layer, "gate", None), "rule", None), "k", None)
    if each is None:
        taken = per_row[per_row > 0]
        compete = compete & ((taken - taken[:1]).abs() < 1e-3).all()
        each = taken[0] if len(taken) else 0.0
    seen = torch.where(compete, (per_row > 0).sum(), keep.shape[0]).to(keep.dtype)
    kept = torch.cat([keep.new_zeros(call.first), keep.sum(0)])
    rows = torch.cat([keep.new_zeros(call.first), seen.expand(columns)])
    return Load(kept, rows, compete, torch.as_tensor(each, dtype=keep.dtype, device=keep.device))


def _grown(load: Load, more: int) -> Load:
    pad = load.kept.new_zeros(more)
    return load._replace(kept=torch.cat([load.kept, pad]), rows=torch.cat([load.rows, pad]))
