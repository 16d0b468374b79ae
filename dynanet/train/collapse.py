"""Collapse: a gate that keeps nearly everything or nearly nothing, or units of which a few get nearly all rows."""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from dynanet.core.gate import Gate
from dynanet.core.halt import Halt
from dynanet.core.trace import Call, Trace

RATES = (0.02, 0.98)  # outside, a gate has collapsed
SPREAD = 2.0  # above, units that compete for rows have collapsed: standard deviation over mean of their loads
ENOUGH = 200  # decisions; with fewer, a rate says little


class Load(NamedTuple):
    """How often the units of a layer were kept.

    Attributes:
        kept: (units,) rows that kept each.
        rows: (units,) rows that were decided on; where units compete, those that kept any (padding keeps none).
        compete: one bool; every row keeps the same number of several units (top-k), so that only the spread over the
            units can show a collapse, not the rate.
        each: one number; how many units a row keeps, if they compete.
    """

    kept: Tensor
    rows: Tensor
    compete: Tensor
    each: Tensor

    def __add__(self, other: "Load") -> "Load":  # type: ignore[override]
        more = other.kept.shape[0] - self.kept.shape[0]
        mine = _padded(self, max(0, more))
        others = _padded(other, max(0, -more))
        return Load(mine.kept + others.kept, mine.rows + others.rows, mine.compete & others.compete, mine.each)

    def rate(self) -> float:
        """The share of decisions that kept."""
        return float(self.kept.sum() / self.rows.sum().clamp(min=1))

    def spread(self) -> float:
        """The coefficient of variation of the loads: 0 if all are equal, (units - 1)^(1/2) if one unit has all rows."""
        load = self.kept / self.rows.clamp(min=1)
        return float(load.std(correction=0) / load.mean().clamp(min=1e-12))

    def most_spread(self) -> float:
        """The spread above which units have collapsed: SPREAD, or less where few units compete and cannot reach it."""
        return min(SPREAD, 0.9 * max(self.kept.shape[0] / max(float(self.each), 1e-12) - 1, 0.0) ** 0.5)


def loads(trace: Trace) -> dict[str, Load]:
    """The load of every learnt gate's units, by layer.

    A learnt gate is one in train mode whose scores or keep have a gradient. An exit that always continues in training
    is not counted. Loads are over the rows that reached a layer.
    """
    found: dict[str, Load] = {}
    layers = {name: layer for layer, name in trace.names.items()}
    for call in trace.calls:
        layer = layers[call.name]
        scored = call.decision.score.requires_grad and not isinstance(layer, Halt)
        if layer.training and (call.decision.keep.requires_grad or scored):
            load = _load(call, layer)
            found[call.name] = found[call.name] + load if call.name in found else load
    return found


def collapsed(found: dict[str, Load]) -> dict[str, str]:
    """A warning for each collapsed layer, by its name. Layers with fewer than `ENOUGH` decisions are left out."""
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
    """Warns of collapsed layers, once for each.

    `train.TrainingModule` has one; in a loop of your own, call `log` with every trace and `warn` after every epoch.
    """

    def __init__(self) -> None:
        self._found: dict[str, Load] = {}
        self._warned: set[str] = set()

    def log(self, trace: Trace) -> None:
        """Count the decisions of one recorded pass."""
        for name, load in loads(trace).items():
            self._found[name] = self._found[name] + load if name in self._found else load

    def warn(self) -> None:
        """Warn of layers that have collapsed since the last call, unless they were named before.

        Layers with too few decisions keep their counts until the next call.
        """
        for name, warning in collapsed(self._found).items():
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(warning, stacklevel=2)
        self._found = {name: load for name, load in self._found.items() if load.rows.sum() < ENOUGH}


def _load(call: Call, layer: Module) -> Load:
    keep = call.decision.keep.detach().flatten(0, -2).float()  # (rows, columns); half precision cannot count to 32,769
    columns = keep.shape[-1]
    per_row = keep.sum(1)
    compete = torch.tensor(columns > 1, device=keep.device)
    # Top-k rules fix the number of units that a row keeps, and hold it as k; others have no such attribute.
    fixed = [vars(gate.rule)["k"] for gate in layer.children() if isinstance(gate, Gate) and "k" in vars(gate.rule)]
    each: Any = fixed[0] if fixed else None
    if each is None:  # the rule does not fix the number of units: they compete if all rows kept equally many
        taken = per_row[per_row > 0]
        compete = compete & ((taken - taken[:1]).abs() < 1e-3).all()
        each = taken[0] if len(taken) else 0.0
    seen = torch.where(compete, (per_row > 0).sum(), keep.shape[0]).to(keep.dtype)
    kept = torch.cat([keep.new_zeros(call.first), keep.sum(0)])
    rows = torch.cat([keep.new_zeros(call.first), seen.expand(columns)])
    return Load(kept, rows, compete, torch.as_tensor(each, dtype=keep.dtype, device=keep.device))


def _padded(load: Load, more: int) -> Load:
    pad = load.kept.new_zeros(more)
    return load._replace(kept=torch.cat([load.kept, pad]), rows=torch.cat([load.rows, pad]))
