"""A CostModel prices every unit of a model, from what really ran."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, evaluating, everything, execute, forced, layers, record
from dynanet.core.errors import REFUSALS, InputError, StructureError, cannot_take
from dynanet.core.macs import CountMacs
from dynanet.core.trace import Call, Trace

log = logging.getLogger(__name__)


class CostModel:
    """Prices the units of a model, and what a forward pass spent.

    Prices are measured, not derived: in one sparse pass with everything kept, MACs are counted at dispatch and
    attributed to the innermost unit that ran, then divided by its rows. MACs are the multiply-accumulates of
    convolutions, linears, matmuls and attention. Prices hold for inputs of the example's size: make a cost model for
    every size. A trace with another number of rows per sample is warned of where much runs outside of all units.

    Layers go by their names, so a cost model also prices traces of a copy of the model, such as a session.

    Attributes:
        full: MACs per sample of the dense form, everything computed; of units that exclude each
            other (`Dynamic.max_units`) the most expensive only: no row can cost more.
        always: MACs per sample in no unit: what runs whatever is decided, gates included.
        worst: MACs per sample of the most expensive path: the sparse form with everything kept, units that exclude
            each other counted as in `full`. More than `full` where halos are read twice; less under a hard cap
            (`Halt.limit`).
        uncounted: operators that ran and cost nothing here, though they may multiply; see `CountMacs`.
        unit: by layer, the price of one row of each unit, (units,) or (units, degree) float64.

    Args:
        model: any module; its modes are left as they were.
        example: an input batch; one sample suffices.

    Raises:
        InputError: an example that the model cannot take.
        StructureError: an operator that multiplies and cannot be counted; an example without samples, or (where
            attention is priced) of one row per sample only.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, example: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()]
        if not tensors:
            raise InputError(
                f"the example is {type(example).__name__} without a tensor; expected tensors with the samples as their "
                f"first axis"
            )
        samples = tensors[0].shape[0]
        if samples == 0:
            raise StructureError("a cost model needs an example with at least one sample; this batch is empty")
        found = layers(model)
        with _as_deployed(model):
            execute(model, sparse=False)
            with record(model) as all_of_it, CountMacs(all_of_it) as dense, forced(model, everything):
                _try(model, example, samples)
            execute(model, sparse=True)
            passes = [_counted(model, example, everything)]
            for power in range(2, 1 + max((layer.degree for layer in found.values()), default=1)):
                passes.append(_counted(model, example, _one_in(power)))
        trace, macs = passes[0]
        most = {name: layer.max_units for name, layer in found.items()}
        self.uncounted = sorted(dense.uncounted)
        self.full = _one_path(all_of_it, dense.macs, most) / samples
        self.always = macs[None] / samples
        self.worst = _one_path(trace, macs, most) / samples
        self.unit = {name: _prices(name, layer, passes) for name, layer in found.items() if name in trace.keys()}
        self._price = {name: layer.price for name, layer in found.items()}
        self._rows = {(call.name, call.keep.shape[1:-1]) for call in trace.calls}
        self._warned = False

    def spent(self, trace: Trace) -> Tensor:
        """MACs per sample of a recorded pass, (B,) float64: equal to what runs when the sample runs sparsely alone.

        In training it is the expected cost, with gradients to every gate that a unit hung on.

        Raises:
            StructureError: the trace is empty, or of a model with other units.
        """
        spent = _zeros(trace) + self.always
        for call in trace.calls:
            spent = spent + self._call(call)
        return spent

    @contextmanager
    def most_expensive(self, model: nn.Module) -> Iterator[None]:
        """Inside, every row of the model takes the most expensive path.

        Everything is kept; of units that exclude each other the most expensive ones, by their own price without what
        is decided inside them.

        Args:
            model: the priced model, or a copy of it, such as a session.
        """
        found = layers(model)
        before = [layer.force for layer in found.values()]
        for name, layer in found.items():
            layer.force = everything if layer.max_units is None else _best_units(self.unit[name], layer.max_units)
        try:
            yield
        finally:
            for layer, was in zip(found.values(), before, strict=True):
                layer.force = was

    def steps(self, trace: Trace, name: str = "") -> Tensor:
        """MACs per sample if it left a Halt after its first, second, ... step: (B, steps) float64.

        Read off a trace in which every step ran (`forced(model, everything)`, or no threshold); decisions of layers
        inside the steps count as they were made.

        Raises:
            StructureError: the trace is empty, of a model with other units, or has no layer of that name.
        """
        if name not in trace.names.values():
            raise StructureError(f"{name!r} is not a layer of this trace; there are {sorted(trace.names.values())}")
        zeros = _zeros(trace)
        depth = 1 + max((call.first + 1 for call in trace.calls if call.name == name), default=0)
        spent = [zeros] * depth
        for call in trace.calls:
            if call.name == name:
                arrived = call.first + 1
            else:
                arrived = 1 + call.around.get(name, -1)
            spent[arrived] = spent[arrived] + self._call(call)
        return self.always + torch.stack(spent, 1).cumsum(1)

    def _call(self, call: Call) -> Tensor:
        if call.name not in self.unit:
            raise StructureError(f"the trace has a layer {call.name!r} that this cost model never saw; make one for it")
        another = (call.name, call.keep.shape[1:-1]) not in self._rows
        if another and not self._warned and self.always > 0.05 * self.full:
            self._warned = True
            log.warning(
                "%r decided on %s rows per sample, another number than in the example of this cost model. What runs "
                "whatever is decided (%.0f%% of all) is priced for the example's size: make a cost model per size",
                call.name, tuple(call.keep.shape[1:-1]), 100 * self.always / self.full,
            )  # fmt: skip
        prices = self.unit[call.name].to(call.keep.device)[call.first : call.first + call.keep.shape[-1]]
        if prices.shape[0] != call.keep.shape[-1]:
            raise StructureError(
                f"{call.name!r} decided on unit {call.first + call.keep.shape[-1] - 1}, which did not run when this "
                f"cost model was made (has a limit been raised since?); make one for the model as it is"
            )
        return self._price[call.name](call.keep, prices)

    def __str__(self) -> str:
        full = self.full or 1.0  # a model without a product has nothing to share out
        lines = [f"{'layer':32} {'unit':>5} {'MACs per row':>16} {'share':>7}"]
        lines.append(f"{'(always)':32} {'':>5} {self.always:>16,.0f} {self.always / full:>7.1%}")
        for name, prices in self.unit.items():
            for u, price in enumerate(prices):
                shown = f"{price.item():,.0f}" if price.dim() == 0 else " + ".join(f"{p:,.0f}" for p in price.tolist())
                share = f"{price.item() / full:.1%}" if price.dim() == 0 else ""
                lines.append(f"{name or '(model)':32} {u:>5} {shown:>16} {share:>7}")
        lines.append(f"{'full (dense, all computed)':38} {self.full:>16,.0f} {self.full / full:>7.1%}")
        lines.append(f"{'worst case (sparse, all kept)':38} {self.worst:>16,.0f} {self.worst / full:>7.1%}")
        if self.uncounted:
            lines.append(f"not counted: {', '.join(self.uncounted)}")
        return "\n".join(lines)


def _try(model: nn.Module, example: Any, samples: int) -> None:
    try:
        model(example)
    except REFUSALS as error:
        raise cannot_take(error, samples) from error


@contextmanager
def _as_deployed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; all flags are restored afterwards."""
    sparse = {layer: layer.sparse for layer in layers(model).values()}
    try:
        with evaluating(model):
            yield
    finally:
        for layer, mode in sparse.items():
            layer.sparse = mode


def _counted(model: nn.Module, example: Any, keep: Callable[[Decision], Tensor]) -> tuple[Trace, Any]:
    with record(model) as trace, forced(model, keep), CountMacs(trace) as count:
        model(example)
    return trace, count.macs


def _one_path(trace: Trace, macs: Counter[tuple[str, range] | None], most: dict[str, int | None]) -> float:
    """The MACs of one path, where a layer runs only its `most` most expensive units."""
    above: dict[str, set[tuple[str, int] | None]] = {}
    for call in trace.calls:
        above.setdefault(call.name, set()).add(call.innermost)
    for frame in filter(None, macs):
        above.setdefault(frame[0], {None})
    # A layer that several units share counts beside them: more than a path takes, never less.
    parent = {name: units.pop() if len(units) == 1 else None for name, units in above.items()}

    def inside(unit: tuple[str, int] | None) -> float:
        return sum(layer(name) for name, around in parent.items() if around == unit)

    def layer(name: str) -> float:
        units: Counter[int] = Counter()
        for frame in filter(None, macs):
            if frame[0] == name:
                units[frame[1].start] += macs[frame]
        starts = set(units) | {around[1] for around in parent.values() if around is not None and around[0] == name}
        costs = sorted((units[start] + inside((name, start)) for start in starts), reverse=True)
        return sum(costs[: most[name]])

    return macs[None] + inside(None)


def _best_units(prices: Tensor, most: int) -> Callable[[Decision], Tensor]:
    best = prices.reshape(prices.shape[0], -1).sum(1).topk(min(most, prices.shape[0])).indices

    def keep(decision: Decision) -> Tensor:
        return torch.zeros_like(decision.keep).index_fill(-1, best.to(decision.keep.device), 1)

    return keep


def _zeros(trace: Trace) -> Tensor:
    """A zero for every sample of a trace, (B,) float64."""
    logged = [call.keep for call in trace.calls[:1]]
    if not logged:  # a Halt that may take one step only decides nothing, but it answers
        logged = [leaf for leaf in tree_leaves(trace.answers) if isinstance(leaf, Tensor)]
    if logged:
        return torch.zeros(logged[0].shape[0], dtype=torch.float64, device=logged[0].device)
    if not trace.names:
        raise StructureError("this trace is of a model without dynamic layers: every sample costs `cost.always`")
    raise StructureError("nothing was decided in this trace: run the model inside `with record(model) as trace`")


def _one_in(n: int) -> Callable[[Decision], Tensor]:
    """Keep every n-th row along the last row axis: another count of rows, for prices that are not linear in it."""

    def keep(decision: Decision) -> Tensor:
        rows = decision.keep.shape[-2]
        mask = (torch.arange(rows, device=decision.keep.device) % n == 0).to(decision.keep)
        return mask[:, None].expand_as(decision.keep)

    return keep


def _prices(name: str, layer: Dynamic, passes: list[tuple[Trace, Any]]) -> Tensor:
    """(units,) or (units, degree): the price of a row, from as many passes as the layer's degree asks for."""
    ran = [_ran(trace, name) for trace, _ in passes[: layer.degree]]
    units = 1 + max(ran[0])
    prices = torch.zeros(units, layer.degree, dtype=torch.float64)
    frames = {frame for frame in passes[0][1] if frame is not None and frame[0] == name}
    for frame in frames:
        counts, macs = [], []
        for by_unit, (_, counted) in zip(ran, passes, strict=False):
            kept = torch.stack([k for unit in frame[1] for k in by_unit.get(unit, [])])  # (calls and units, B)
            counts.append(torch.stack([(kept**power).sum() for power in range(1, layer.degree + 1)]))
            macs.append(float(counted[frame]))
        rows = torch.stack(counts).double()
        spent = torch.tensor(macs, dtype=torch.float64)
        if layer.degree == 1:
            prices[list(frame[1])] = spent / rows[:, 0].clamp(min=1)
        elif torch.linalg.matrix_rank(rows) < layer.degree:
            raise StructureError(
                f"{name!r} has a price of degree {layer.degree} in its rows, and this example is too small to "
                f"separate the degrees; give samples of at least {layer.degree} rows"
            )
        else:
            prices[list(frame[1])] = torch.linalg.solve(rows, spent)
    return prices[:, 0] if layer.degree == 1 else prices


def _ran(trace: Trace, name: str) -> dict[int, list[Tensor]]:
    """For every unit of a layer: the rows that ran it in each sample (B,), call by call."""
    ran: dict[int, list[Tensor]] = {}
    for call in trace.calls:
        if call.name == name:
            kept = call.keep.double().cpu()
            rows = kept.flatten(1, -2).sum(1) if kept.dim() > 2 else kept  # (B, units)
            for u in range(rows.shape[-1]):
                ran.setdefault(call.first + u, []).append(rows[..., u])
    return ran
