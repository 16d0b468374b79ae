"""The abstract task: how a network is trained for it, how its answers are scored, and how they are drawn."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import layers
from dynanet.core.errors import ConfigError
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.train.objectives import TargetRate
from dynanet.train.schedules import Setting

_RATE_WEIGHT = 4.0  # of the penalty for a wrong rate, beside a loss of about 1


@dataclass(frozen=True)
class TrainingOptions:
    """The options that an experiment has for an objective.

    Attributes:
        exit_weights: of the exits' losses; None: equal.
        distill: weight of the distillation from the last exit into the others.
        label_smoothing: share of the target spread over all classes.
        ponder: weight of the ponder cost, where positions halt.
        rate: share of the samples for which every skippable layer should run; None: unconstrained.
    """

    exit_weights: Sequence[float] | None = None
    distill: float = 0.0
    label_smoothing: float = 0.0
    ponder: float = 0.0
    rate: float | None = None


@dataclass(frozen=True)
class Score:
    """The quality and the cost of a model's answers.

    Attributes:
        figures: by name, shares of which higher is better; the main one first.
        macs: per sample, as really spent.
        by_class: by name of the figure, (C,) of every class; NaN where there is none.
    """

    figures: dict[str, float]
    macs: float
    by_class: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Overlay:
    """What can be drawn over the image of a sample, of its answer and its truth.

    Attributes:
        caption: in words.
        found: boxes, as (corners, label, score).
        truth: boxes, as (corners, label).
        labels: (H, W) int, the predicted class of every pixel; None: no such answer.
        known: (H, W) int, the true class; negative: void.
    """

    caption: str = ""
    found: Sequence[tuple[list[float], int, float]] = ()
    truth: Sequence[tuple[list[float], int]] = ()
    labels: np.ndarray | None = None
    known: np.ndarray | None = None


class Task(ABC):
    """A task that networks can be trained, calibrated and measured for.

    Attributes:
        monitor: the metric of the best epoch.
        lower_is_better: the monitored metric is a loss.
        tabulated: thresholds can be calibrated on a table of exits; else the model is only scored as it is.
        figures: names of the figures of `score`, where the rows of the table are parts of answers (pixels) and whole
            answers have to be scored. Empty: the table says it all.
    """

    monitor: ClassVar[str] = "val/accuracy"
    lower_is_better: ClassVar[bool] = False
    tabulated: ClassVar[bool] = True
    figures: ClassVar[tuple[str, ...]] = ()

    @property
    def ignore(self) -> int | None:
        """The label of rows without a label; None: every row has one."""
        return None

    @abstractmethod
    def objective(self, model: nn.Module, options: TrainingOptions) -> Objective:
        """The objective that training minimises.

        Raises:
            ConfigError: an option that this task or model does not support.
        """

    @abstractmethod
    def score(self, model: nn.Module, batches: Iterable[tuple[Any, Tensor]], cost: CostModel) -> Score:
        """Score the answers of a model in eval mode, at its thresholds.

        Args:
            model: the model.
            batches: inputs and labels.
            cost: of this model.

        Raises:
            DataError: no labels, or labels that do not fit the model.
        """

    def overlay(self, answer: Tensor, y: Tensor, classes: Sequence[str], size: tuple[int, int]) -> Overlay:
        """What to draw over an image.

        Args:
            answer: the model's, of a batch of one.
            y: the label of this sample, as in a batch of one.
            classes: names of the classes.
            size: (height, width) of the image.
        """
        return Overlay()

    def true_boxes(self, y: Tensor) -> list[Tensor]:
        """The boxes (N, 4) of every sample of a batch of labels; no list entries where labels are not boxes."""
        return []


def schedules(model: nn.Module) -> list[Setting]:
    """The settings that the layers of a model change while it is trained."""
    return [setting for layer in layers(model).values() for setting in layer.schedules()]


def finish_training(model: nn.Module) -> None:
    """Make a trained model one that never exits early, to be calibrated."""
    for layer in layers(model).values():
        layer.finish_training()


def with_layer_terms(objective: Objective, model: nn.Module, options: TrainingOptions) -> Objective:
    """The objective with the terms of the model's layers: their ponder costs, and the rates of skippable ones.

    Raises:
        ConfigError: an option for layers that the model does not have.
    """
    found = layers(model)
    kinds = dict.fromkeys(type(layer) for layer in found.values())
    costs = [cost for kind in kinds if (cost := kind.ponder_cost()) is not None]
    if options.ponder and not costs:
        raise ConfigError(f"recipe.ponder is {options.ponder:g}, but no position of this model halts; leave it at 0")
    for cost in costs:
        objective = objective + options.ponder * cost
    if options.rate is None:
        return objective
    skippable = [name for name, layer in found.items() if layer.skippable]
    if not skippable:
        raise ConfigError(f"recipe.rate is {options.rate:g}, but no layer of this model is skipped; leave it out")
    return objective + _RATE_WEIGHT * TargetRate(dict.fromkeys(skippable, options.rate))


def spent_macs(trace: Trace, cost: CostModel, samples: int) -> Tensor:
    """MACs of every sample of a recorded batch, (samples,) float64; of the full model where nothing was decided."""
    return cost.spent(trace) if trace.calls else torch.full((samples,), cost.full, dtype=torch.float64)
