"""Classification: one class for every sample."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import record
from dynanet.core.errors import DataError
from dynanet.core.halt import Halt
from dynanet.core.objective import Objective
from dynanet.tasks.task import Overlay, Score, Task, TrainingOptions, spent_macs, with_layer_terms
from dynanet.train.objectives import CrossEntropy, MultiExit


class Classification(Task):
    """A class for every sample, scored by accuracy: from the table of exits, or by `score` where there are none."""

    def objective(self, model: nn.Module, options: TrainingOptions) -> Objective:
        """Cross-entropy, of every exit if there are several."""
        if not isinstance(model, Halt) or not model.multi_exit:
            return with_layer_terms(CrossEntropy(options.label_smoothing), model, options)
        weights = options.exit_weights if options.exit_weights is not None else [1 / model.steps] * model.steps
        exits = MultiExit(weights, distill=options.distill, label_smoothing=options.label_smoothing)
        return with_layer_terms(exits, model, options)

    @torch.no_grad()
    def score(self, model: nn.Module, batches: Iterable[tuple[Any, Tensor]], cost: CostModel) -> Score:
        """Accuracy of a model in eval mode.

        Args:
            model: to logits (B, classes).
            batches: (x, y), y (B,).
            cost: of this model.

        Raises:
            DataError: no samples, or a label outside the classes.
        """
        spent, counted = 0.0, []
        for x, y in batches:
            with record(model) as trace:
                answer = model(x)
            classes = answer.shape[1]
            if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
                raise DataError(
                    f"labels from {int(y.min())} to {int(y.max())} for a model of {classes} classes; give indices from "
                    f"0 to {classes - 1}"
                )
            right = y[answer.argmax(1) == y]
            counted.append(torch.stack([torch.bincount(each, minlength=classes) for each in (right, y)]))
            spent += float(spent_macs(trace, cost, len(y)).sum())
        if not sum(int(each[1].sum()) for each in counted):
            raise DataError("no samples to score; give batches (x, y)")
        right, met = torch.stack(counted).sum(0).double()
        figures = {"accuracy": float(right.sum() / met.sum())}
        return Score(figures, spent / float(met.sum()), {"accuracy": (right / met).tolist()})

    def overlay(self, answer: Tensor, y: Tensor, classes: Sequence[str], size: tuple[int, int]) -> Overlay:
        """The predicted class, and the true one if it is another."""
        predicted, known = int(answer[0].argmax()), int(y[0])
        return Overlay(classes[predicted] + ("" if predicted == known else f" (is {classes[known]})"))
