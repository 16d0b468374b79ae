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
from dynanet.core.halt import Halt


@dataclass(frozen=True, eq=False)
class Frontier:
    """A model and its table: ask it for the model of any budget."""

    model: nn.Module
    table: ExitTable

    def at(self, budget: Budget, losses: np.ndarray | None = None) -> nn.Module:
        """A copy of the model, in eval mode, that keeps to the budget.

        Args:
            budget: what is asked.
            losses: (N, K) of the held-out samples, for a risk of your own; see `choose`.

        Warns:
            UncertifiedWarning: the asked risk cannot be promised for any early exit, and why. The copy never exits
                early.

        Raises:
            BudgetError: as `choose`.
        """
        choice = self.choose(budget, losses)
        if choice.promised is not None and choice.note:
            warnings.warn(choice.note, UncertifiedWarning, stacklevel=2)
        return apply(self.model, choice)

    def choose(self, budget: Budget, losses: np.ndarray | None = None) -> OperatingPoint:
        """The thresholds that `at` sets, and what they do; see the function `choose`.

        Raises:
            BudgetError: as `choose`; or a risk for positions, which depend on each other within an image.
        """
        if self.table.groups is not None and budget.risk is not None:
            raise BudgetError(
                f"a risk of {budget.risk:g} cannot be promised from positions: those of one image depend on each "
                f"other; so ask in macs"
            )
        return choose(self.table, budget, losses)

    def curve(self, points: int = 25) -> list[OperatingPoint]:
        """The best choices from the cheapest path to the dearest, at budgets evenly apart in MACs."""
        return curve(self.table, points)

    def timed(self, ms: Iterable[float]) -> "Frontier":
        """The same with the measured milliseconds per sample that leaves at every exit, (K,); for Budget(ms=...)."""
        return replace(self, table=replace(self.table, ms=np.array(list(ms), dtype=np.float64)))

    def save(self, folder: str | os.PathLike) -> None:
        """Write a folder: the table, and the curve's choices as JSON for whoever reads thresholds elsewhere."""
        points = [_plain(choice) for choice in self.curve()]

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
            raise DataError(f"{os.fspath(folder)} has {table.exits} exits, this model {steps}; calibrate this one")
        return cls(model, table)


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
        ignore: the label of samples, or pixels, that have none.

    Raises:
        StructureError: the model has no exits to choose.
        DataError: no samples, labels that are no class indices, answers that are not finite.
    """
    _thresholds(halt_of(model)[1])
    frontier = Frontier(model, tabulate(model, held_out, cost, ignore=ignore))
    return frontier if ms is None else frontier.timed(ms)


def apply(model: nn.Module, choice: OperatingPoint) -> nn.Module:
    """A copy of the model, in eval mode, with the thresholds and the limit of a choice.

    Raises:
        StructureError: the model has no thresholds, or another number of them.
    """
    copied = with_thresholds(model, choice.thresholds)
    halt = halt_of(copied)[1]
    if isinstance(halt, Halt):  # thresholds of -inf cap the others
        halt.limit = choice.limit
    return copied


def with_thresholds(model: nn.Module, given: np.ndarray) -> nn.Module:
    """A copy of the model, in eval mode, with other thresholds (K - 1,): +inf nobody leaves there, -inf everybody.

    Raises:
        StructureError: the model has no thresholds, or another number of them.
    """
    halt = halt_of(copied := copy.deepcopy(model).eval())[1]
    thresholds = _thresholds(halt)
    places = places_of(halt)
    if places.shape != given.shape:
        raise StructureError(f"{len(given)} thresholds chosen for a model that has {len(places)}")
    with torch.no_grad():
        thresholds.fill_(torch.inf)[places] = torch.from_numpy(given).to(thresholds)
    return copied


def select_exits(table: ExitTable, exit_macs: Sequence[float], budget: Budget) -> tuple[int, ...]:
    """The exits that are worth their price under a budget; switch the others off (`EarlyExit.active`).

    A sample that goes on pays for every classifier that it passes. So exits are taken away one by one, always the one
    without which the held-out accuracy within the budget is highest, until every one left would be missed. Choose
    exits on held-out data, and calibrate the model that is left; no risk is promised for rows that chose the exits.

    Args:
        table: of held-out data, with all exits.
        exit_macs: (K,) MACs that switching an exit off saves, `EarlyExit.exit_macs`.
        budget: with `macs` alone.

    Returns:
        Ascending numbers of exits, the last one included. The last one alone: no early exit pays at this budget.

    Raises:
        BudgetError: another budget, or one out of this table's range.
        DataError: not one price per exit, or prices that the table's costs do not hold.
    """
    bound = budget.macs
    if bound is None or any(b is not None for b in (budget.risk, budget.ms, budget.cap_macs)):
        raise BudgetError(f"exits are chosen for a mean cost in MACs, and this is {budget}; give Budget(macs=...) only")

    def reached(exits: tuple[int, ...]) -> tuple[float, float] | None:
        """(accuracy, MACs saved), the higher the better; None if the bound is out of reach."""
        left = with_exits(table, exits, exit_macs)
        if left.mean_macs.min() > bound:
            return None
        choice = choose(left, Budget(macs=min(bound, float(left.mean_macs.max()))))
        return choice.accuracy, -choice.macs

    best = choose(table, budget)
    exits, value = tuple(range(table.exits)), (best.accuracy, -best.macs)
    while len(exits) > 1:
        fewer = [exits[:i] + exits[i + 1 :] for i in range(len(exits) - 1)]
        found = [(v, left) for left in fewer if (v := reached(left)) is not None and v[0] >= value[0]]
        if not found:
            break
        value, exits = max(found)
    return exits


def with_exits(table: ExitTable, exits: Sequence[int], exit_macs: Sequence[float]) -> ExitTable:
    """The table of the model with only these exits active: the same answers and scores, at lower prices.

    For confidences without memory; where an exit's score depends on those before it (`Patience`), calibrate the model.

    Args:
        table: with all exits.
        exits: ascending numbers, the last one included.
        exit_macs: see `select_exits`.

    Raises:
        DataError: as `select_exits`, or exits that the table does not have.
    """
    prices, kept = np.asarray(exit_macs, dtype=np.float64), list(exits)
    if kept != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] != table.exits - 1:
        raise DataError(f"exits {kept} of a table of {table.exits}; give ascending numbers, the last one included")
    if prices.shape != (table.exits,) or (prices < 0).any() or (prices.cumsum() > table.mean_macs * (1 + 1e-9)).any():
        raise DataError(f"exit_macs of {prices.tolist()} for exits that cost {table.mean_macs.tolist()} in all")
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
    """The buffer through which a Halt is calibrated."""
    thresholds = thresholds_of(halt)
    if thresholds is None:
        raise StructureError(f"{type(halt).__name__} has no buffer `thresholds` to be calibrated; EarlyExit has one")
    return thresholds


def places_of(halt: Dynamic) -> Tensor:
    """(steps - 1,) int64, which of its thresholds each step has: a Halt with exits that are switched off tells it by a
    buffer `leaves`, and the thresholds of those exits stay infinite.
    """
    found = dict(halt.named_buffers(recurse=False)).get("leaves")
    return torch.arange(len(_thresholds(halt))) if found is None else found


def _plain(choice: OperatingPoint) -> dict[str, Any]:
    """For JSON, which knows no infinity: those thresholds are the strings "inf" and "-inf", as float() reads them."""
    thresholds = [t if np.isfinite(t) else str(t) for t in choice.thresholds.tolist()]
    plain = asdict(choice) | {"budget": asdict(choice.budget), "thresholds": thresholds, "share": choice.share.tolist()}
    return {key: value for key, value in plain.items() if value is not None}
