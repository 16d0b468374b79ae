"""Test figures of a run, as `results.json` holds them."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynanet.calibrate.anytime import random_exits
from dynanet.calibrate.budgeted import outcome
from dynanet.calibrate.frontier import Frontier, with_thresholds
from dynanet.calibrate.operating_point import OperatingPoint
from dynanet.calibrate.table import ExitTable, halt_of
from dynanet.core.confidence import Confidence
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute
from dynanet.core.errors import StructureError
from dynanet.datamodules.module import DataModule
from dynanet.experiment.budgets import full_macs, in_words

AS_TRAINED = "as trained"


def table_figures(table: ExitTable, points: Sequence[OperatingPoint], full: float) -> dict[str, Any]:
    """Accuracy and MACs of every exit and operating point, beside those of random exits at the same rates.

    Args:
        table: of the test data.
        points: chosen on held-out data.
        full: MACs of the full model.
    """
    rows = []
    for point in points:
        reached = outcome(table, point.thresholds)
        rows.append(
            {
                "requested": in_words(point.budget, full),
                "requested_macs": point.budget.macs,
                "held_out_macs": point.macs,
                "test_macs": reached.macs,
                "test_macs_share": reached.macs / full,
                "test_accuracy": reached.accuracy,
                "lost": table.accuracy[-1] - reached.accuracy,
                "random_exits_accuracy": random_exits(table, reached.share).accuracy,
                "shares": reached.share.tolist(),
                "note": point.note,
            }
        )
    return {
        "macs_per_exit": table.mean_macs.tolist(),
        "accuracy_per_exit": table.accuracy.tolist(),
        "operating_points": rows,
    }


def scored(name: str, model: nn.Module, data: DataModule, cost: CostModel) -> dict[str, Any]:
    """Figures and MACs of whole answers, the model run sparsely.

    Args:
        name: of the setting.
        model: at its thresholds; left as it is.
        data: whose test split is scored.
        cost: of this model.
    """
    score = data.task.score(execute(copy.deepcopy(model), sparse=True), data.test, cost)
    by_class = {figure: dict(zip(data.classes, each, strict=True)) for figure, each in score.by_class.items()}
    return {"name": name, "macs": score.macs, **score.figures, "by_class": by_class}


def settings(frontier: Frontier, points: Sequence[OperatingPoint]) -> Iterator[tuple[str, nn.Module]]:
    """Every exit alone, every operating point, and random exits at the rates of each point."""
    exits = frontier.table.exits
    for k in range(exits):
        thresholds = np.full(exits - 1, np.inf)
        thresholds[k:] = -np.inf
        yield f"all at exit {k + 1}", with_thresholds(frontier.model, thresholds)
    for point in points:
        name = in_words(point.budget, full_macs(frontier))
        yield name, with_thresholds(frontier.model, point.thresholds)
        yield f"{name}, random exits", with_random_exits(frontier.model, point.share)


def with_random_exits(model: nn.Module, share: np.ndarray) -> nn.Module:
    """A copy of a model whose rows leave at random: the baseline that a confidence has to beat.

    Args:
        model: with one layer that is calibrated, whose rows leave by a confidence.
        share: (K,) of the rows that leave at every exit.

    Raises:
        StructureError: rows of the model do not leave by a confidence.
    """
    before = 1 - share.cumsum() + share  # the share that arrives at every exit
    leaves = np.divide(share, before, out=np.ones_like(share), where=before > 1e-9)[:-1]
    copied = with_thresholds(model, np.where(leaves > 0, 1 - leaves, np.inf))
    _, layer = halt_of(copied)
    confidences = [name for name, child in layer.named_children() if isinstance(child, Confidence)]
    if not confidences:
        raise StructureError(f"{type(layer).__name__} has no confidence to replace by random numbers")
    for name in confidences:
        setattr(layer, name, _RandomConfidence())
    return copied


class _RandomConfidence(Confidence):
    """A uniform number between 0 and 1 for every row."""

    def forward(self, logits: Tensor, memory: Any = None) -> Tensor:
        return torch.rand_like(logits[..., :1])
