"""Calibration: one pass over held-out data, then the model of any budget."""

import copy
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynanet.calibrate.operating_point import OperatingPoint, choose, curve
from dynanet.calibrate.risk import UncertifiedWarning
from dynanet.calibrate.table import ExitTable, exits_of, halt_of, tabulate, thresholds_of
from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import BudgetError, DataError, StructureError
from dynanet.core.files import write_atomically, write_folder_atomically
from dynanet.core.halt import Halt, ThresholdHalt


@dataclass(frozen=True, eq=False)
class Frontier:
    """A model with its calibration table, from which it makes the model of any budget.

    Attributes:
        model: calibrated by its table; not changed.
        table: what every exit answers and costs on held-out data.
    """

    model: nn.Module
    table: ExitTable

    def at(self, budget: Budget, losses: np.ndarray | None = None) -> nn.Module:
        """A copy of the model, in eval mode, that keeps to the budget.

        Args:
            budget: the requested limits.
            losses: (N, K) of the held-out samples, for a risk of your own; see `choose`.

        Warns:
            UncertifiedWarning: the risk cannot be promised for any early exit, so the copy never exits early. The
                warning says why.

        Raises:
            BudgetError: as `choose`.
        """
        point = self.choose(budget, losses)
        if point.promised is not None and point.note:
            warnings.warn(point.note, UncertifiedWarning, stacklevel=2)
        return apply(self.model, point)

    def choose(self, budget: Budget, losses: np.ndarray | None = None) -> OperatingPoint:
        """The operating point for a budget; see the function `calibrate.operating_point.choose`.

        Raises:
            BudgetError: as the function; or a risk for positions, which depend on each other within an image.
        """
        if self.table.groups is not None and budget.risk is not None:
            raise BudgetError(
                f"a risk of {budget.risk:g} cannot be promised from positions: those of one image depend on each "
                f"other; give Budget(macs=...)"
            )
        return choose(self.table, budget, losses)

    def curve(self, points: int = 25) -> list[OperatingPoint]:
        """Operating points from the cheapest path to the most expensive, at budgets evenly spaced in MACs."""
        return curve(self.table, points)

    def timed(self, ms: Iterable[float]) -> "Frontier":
        """A copy with measured milliseconds per sample that leaves at every exit, (K,), for Budget(ms=...)."""
        return replace(self, table=replace(self.table, ms=np.array(list(ms), dtype=np.float64)))

    def save(self, folder: str | os.PathLike) -> None:
        """Write a folder: `table.npz`, and the operating points of the curve as `frontier.json` for other programs."""
        points = [_plain(point) for point in self.curve()]

        def fill(fresh: Path) -> None:
            self.table.save(fresh / "table.npz")
            text = json.dumps({"exits": self.table.exits, "samples": self.table.samples, "curve": points}, indent=1)
            write_atomically(fresh / "frontier.json", lambda file: file.write(text.encode()))

        write_folder_atomically(folder, fill)

    @classmethod
    def load(cls, folder: str | os.PathLike, model: nn.Module) -> "Frontier":
        """Read what `save` wrote, for the model it was made with.

        Raises:
            DataError: no such folder, or the table of a model with another number of exits.
        """
        table = ExitTable.load(Path(folder) / "table.npz")
        steps = exits_of(halt_of(model)[1])
        if steps != table.exits:
            raise DataError(
                f"{os.fspath(folder)} has {table.exits} exits and this model {steps}; calibrate the model again"
            )
        return cls(model, table)

    def __str__(self) -> str:
        table = self.table
        costs = table.mean_macs
        rows = "samples" if table.groups is None else "positions"
        return (
            f"Frontier of {type(self.model).__name__}: {table.exits} exits, {costs.min():,.0f} to {costs.max():,.0f} "
            f"MACs per sample, accuracy {table.accuracy[0]:.2%} at the first exit and {table.accuracy[-1]:.2%} at the "
            f"last, on {table.samples:,} held-out {rows}"
        )


def calibrate(
    model: nn.Module,
    held_out: Iterable[Any],
    cost: CostModel,
    *,
    ms: Iterable[float] | None = None,
    ignore: int | None = None,
) -> Frontier:
    """One pass over held-out data; then any budget without another.

    Args:
        model: with one layer that halts (EarlyExit, PixelCascade) and answers logits.
        held_out: batches (x, y) that the model was not trained on, without augmentation. Not the test data.
        cost: of this model.
        ms: (K,) measured milliseconds per sample that leaves at every exit, for budgets in ms.
        ignore: the label of samples, or pixels, without a label.

    Raises:
        StructureError: the model has no layer with thresholds.
        DataError: no samples, labels that are not class indices, answers that are not finite.
    """
    _thresholds(halt_of(model)[1])  # fail before the pass over the data
    frontier = Frontier(model, tabulate(model, held_out, cost, ignore=ignore))
    return frontier if ms is None else frontier.timed(ms)


def apply(model: nn.Module, point: OperatingPoint) -> nn.Module:
    """A copy of the model, in eval mode, with the thresholds and the limit of an operating point.

    Raises:
        StructureError: the model has no thresholds, or another number of them.
    """
    copied = with_thresholds(model, point.thresholds)
    halt = halt_of(copied)[1]
    if isinstance(halt, Halt):  # other layers are capped by thresholds of -inf
        halt.limit = point.limit
    return copied


def with_thresholds(model: nn.Module, given: np.ndarray) -> nn.Module:
    """A copy of the model, in eval mode, with other thresholds (K - 1,): at +inf no row leaves, at -inf all do.

    Raises:
        StructureError: the model has no thresholds, or another number of them.
    """
    copied = copy.deepcopy(model).eval()
    halt = halt_of(copied)[1]
    thresholds = _thresholds(halt)
    exits = threshold_exits(halt)
    if given.shape != (len(exits),):
        raise StructureError(f"got {len(given)} thresholds for a model that has {len(exits)}")
    with torch.no_grad():
        thresholds.fill_(torch.inf)[exits] = torch.from_numpy(given).to(thresholds)
    return copied


def select_exits(table: ExitTable, exit_macs: Sequence[float], budget: Budget) -> tuple[int, ...]:
    """Greedy backward selection of the exits to keep under a budget; switch the others off (`EarlyExit.active`).

    A sample that continues pays for every classifier that it passes. So exits are removed one by one, always the one
    without which the held-out accuracy within the budget is highest, until each removal would lower it. Choose exits on
    held-out data, then calibrate the smaller model; no risk can be promised from the rows that chose the exits.

    Args:
        table: of held-out data, with all exits.
        exit_macs: (K,) MACs that switching an exit off saves, `EarlyExit.exit_macs`.
        budget: with `macs` alone.

    Returns:
        Ascending numbers of exits, the last one included. The last one alone: no early exit helps at this budget.

    Raises:
        BudgetError: another kind of budget, or one out of this table's range.
        DataError: not one price per exit, or prices above the table's costs.
    """
    bound = budget.macs
    if bound is None or any(b is not None for b in (budget.risk, budget.ms, budget.cap_macs)):
        raise BudgetError(f"exits are chosen for a mean cost in MACs, got {budget}; give Budget(macs=...) only")

    def reached(exits: tuple[int, ...]) -> tuple[float, float] | None:
        """(accuracy, -MACs) with these exits, the higher the better; None if the bound cannot be met."""
        left = with_exits(table, exits, exit_macs)
        if left.mean_macs.min() > bound:
            return None
        point = choose(left, Budget(macs=min(bound, float(left.mean_macs.max()))))
        return point.accuracy, -point.macs

    best = choose(table, budget)
    exits = tuple(range(table.exits))
    value = (best.accuracy, -best.macs)
    while len(exits) > 1:
        fewer = [exits[:i] + exits[i + 1 :] for i in range(len(exits) - 1)]
        found = [(v, left) for left in fewer if (v := reached(left)) is not None and v[0] >= value[0]]
        if not found:
            break
        value, exits = max(found)
    return exits


def with_exits(table: ExitTable, exits: Sequence[int], exit_macs: Sequence[float]) -> ExitTable:
    """The table of the model with only these exits active: the same answers and scores, at lower costs.

    Valid for confidences without memory; where a score depends on earlier exits (`Patience`), calibrate the model.

    Args:
        table: with all exits.
        exits: ascending numbers, the last one included.
        exit_macs: see `select_exits`.

    Raises:
        DataError: as `select_exits`, or exits that the table does not have.
    """
    prices = np.asarray(exit_macs, dtype=np.float64)
    kept = list(exits)
    if kept != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] != table.exits - 1:
        raise DataError(f"exits must be ascending numbers, the last one included ({table.exits - 1}); got {kept}")
    if prices.shape != (table.exits,) or (prices < 0).any() or (prices.cumsum() > table.mean_macs * (1 + 1e-9)).any():
        raise DataError(
            f"exit_macs must be {table.exits} numbers whose sums stay within the costs of the exits "
            f"{table.mean_macs.tolist()}, got {prices.tolist()}"
        )
    off = np.ones(table.exits, bool)
    off[kept] = False
    saved = (prices * off).cumsum()[kept]
    return replace(
        table,
        scores=table.scores[:, kept[:-1]],
        answers=table.answers[:, kept],
        correct=table.correct[:, kept],
        macs=table.macs[..., kept] - saved,
        worst=None if table.worst is None else table.worst[kept] - saved,
        ms=None,
        logits=None if table.logits is None else table.logits[:, kept],
    )


def _thresholds(halt: Dynamic) -> Tensor:
    """The buffer of thresholds that calibration sets."""
    thresholds = thresholds_of(halt)
    if thresholds is None:
        raise StructureError(f"{type(halt).__name__} has no buffer `thresholds` to be calibrated; EarlyExit has one")
    return thresholds


def threshold_exits(halt: Dynamic) -> list[int]:
    """The index in `thresholds` of every step but the last.

    Where exits are switched off a step has another number than its exit; the thresholds of those exits stay infinite.
    """
    if isinstance(halt, ThresholdHalt):
        return [halt.exit_of(k) for k in range(halt.steps - 1)]
    return list(range(len(_thresholds(halt))))


def _plain(point: OperatingPoint) -> dict[str, Any]:
    """A point for JSON, without infinities: those thresholds are the strings "inf" and "-inf", which float() reads."""
    thresholds = [t if np.isfinite(t) else str(t) for t in point.thresholds.tolist()]
    plain = asdict(point) | {"thresholds": thresholds, "share": point.share.tolist()}
    return {key: value for key, value in plain.items() if value is not None}
