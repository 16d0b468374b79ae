"""A LightningModule that trains any dynamic model."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, record
from dynanet.core.errors import CheckpointError, TrainingError
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.train.batches import Batches
from dynanet.train.checkpoint import check_same_decisions, check_same_model, decisions, plain_names
from dynanet.train.collapse import CollapseAlarm
from dynanet.train.equilibrium import exits_reached, rescale_gradients
from dynanet.train.given import answering, class_numbers, judging, pair, rows_of, single
from dynanet.train.objectives import BudgetPenalty
from dynanet.train.optimizers import OptimizerFactory, SchedulerFactory, one_cycle, sgd
from dynanet.train.saving import Checkpoints, advice
from dynanet.train.schedules import Setting
from dynanet.train.seeds import seed_all, seed_of


class TrainingModule(LightningModule):
    """Trains a dynamic model of any mechanism.

    It records every pass, evaluates the objective, and logs the loss, the accuracy of the answer and of every exit,
    every layer's mean keep, and the MACs spent as a share of the full model's. It warns once of every gate that
    collapses (`train.collapse`).

    The randomness of every step (dropout, Gumbel noise) is a function of the seed, the epoch and the batch, so a
    resumed run draws as one that never stopped. Training reseeds the global generators of torch, numpy and Python.

    Args:
        model: is put into the dense form, in which every exit answers every row.
        objective: the loss to minimise.
        optimizer: from the model to an optimizer; `sgd()` if None.
        scheduler: from the optimizer and the steps of the run to a learning rate schedule; `one_cycle()` if None.
        schedules: called before every step with the progress in [0, 1).
        cost: prices, for logging the MACs spent; that of a `BudgetPenalty` in the objective if None.
        equilibrium: average the exits' gradients in the weights they share (`train.equilibrium`) instead of adding.
        seed: of the random numbers of training steps.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        schedules: Sequence[Setting] = (),
        cost: CostModel | None = None,
        equilibrium: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = execute(model, sparse=False)
        self.objective = objective
        self.schedules = tuple(schedules)
        self.optimizer_factory = optimizer if optimizer is not None else sgd()
        self.scheduler_factory = scheduler if scheduler is not None else one_cycle()
        priced = (part.cost for _, part in objective.parts if isinstance(part, BudgetPenalty))
        self.cost = cost if cost is not None else next(priced, None)
        self.equilibrium = equilibrium
        self.seed = seed
        self._counts: dict[Tensor, int] | None = None  # exits that reach each weight, for the equilibrium
        self._alarm = CollapseAlarm()
        self._run: dict[str, Any] = {}  # the settings that a resumed run must share
        self._restored: dict[str, Any] | None = None  # of a checkpoint, until its run is known to be the same

    @override
    def forward(self, x: Any) -> Any:
        """The model's answer."""
        return self.model(x)

    @override
    def configure_optimizers(self) -> Any:
        """One optimizer, and a scheduler that is called after every step."""
        optimizer = self.optimizer_factory(self.model)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self.scheduler_factory(optimizer, steps)
        loader = self.trainer.train_dataloader
        settings = ", ".join(f"{name}={value}" for name, value in optimizer.defaults.items())
        self._run = {
            "steps": steps,
            "batches": repr(loader) if isinstance(loader, Batches) else None,
            "optimizer": f"{type(optimizer).__name__}({settings})",
            "scheduler": type(scheduler).__name__,
            "objective": repr(self.objective),
            "equilibrium": self.equilibrium,
            "seed": self.seed,
        }
        self._resume()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_train_start(self) -> None:
        """Resume, under strategies that restore the checkpoint only now."""
        self._resume()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed this step, and apply the schedules."""
        seed_all(seed_of(self.seed, self.current_epoch, batch_idx, self.global_rank, "step"), self.device)
        progress = self.global_step / self.trainer.estimated_stepping_batches
        for setting in self.schedules:
            setting(progress)

    @override
    def training_step(self, batch: tuple[Any, Any], batch_idx: int) -> Tensor:
        """The objective of one batch.

        Raises:
            DataError: a batch that the model or the objective cannot take; the message says what to mend.
            TrainingError: the loss is NaN or infinite.
        """
        answer, y, loss, trace = self._evaluate(batch)
        self._check_finite(loss)
        if self.equilibrium and self._counts is None:
            self._counts = exits_reached(trace)
        self._alarm.log(trace)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        if (self.global_step + 1) % max(1, every) == 0:
            self.log("train/loss", loss.detach(), prog_bar=True)
            self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
            self.log_dict({f"train/{name}": value for name, value in self._figures(answer, y, trace).items()})
        return loss

    @override
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Rescale gradients where gradient equilibrium is on."""
        if self._counts is not None:
            rescale_gradients(self._counts)

    @override
    def on_train_epoch_end(self) -> None:
        """Warn of gates that have collapsed."""
        if self.trainer.is_global_zero:
            self._alarm.warn()

    @override
    def validation_step(self, batch: tuple[Any, Any], batch_idx: int) -> None:
        """The same figures on held-out data, with hard decisions."""
        answer, y, loss, trace = self._evaluate(batch)
        figures = {"loss": loss, **self._figures(answer, y, trace)}
        self.log_dict(
            {f"val/{name}": value for name, value in figures.items()},
            on_step=False,
            on_epoch=True,
            batch_size=rows_of(y),
            sync_dist=self.trainer.world_size > 1,
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the next batch, the settings of the run and the decision rules to the checkpoint."""
        loader = self.trainer.train_dataloader
        position = loader.state_dict() if isinstance(loader, Batches) else {}
        weights = checkpoint[
            "state_dict"
        ]  # under the names of the plain model, into which they go however this one is run
        checkpoint["state_dict"] = {plain: weights[name] for plain, name in plain_names(self, weights).items()}
        checkpoint["dynanet"] = {"run": self._run, "batches": position, "decides": decisions(self.model)}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of this model.

        Raises:
            CheckpointError: it is of another one.
        """
        path = self.trainer.ckpt_path or "the checkpoint"
        mine = plain_names(self, self.state_dict())
        checkpoint["state_dict"] = {mine.get(name, name): value for name, value in checkpoint["state_dict"].items()}
        check_same_model(self.state_dict(), checkpoint["state_dict"], path)
        self._restored = checkpoint.get("dynanet")
        check_same_decisions(self.model, (self._restored or {}).get("decides", {}), path)

    def _evaluate(self, batch: Any) -> tuple[Any, Any, Tensor, Trace]:
        """The answer, the labels, the loss and the trace of a batch."""
        x, y = pair(batch)
        x, y = single(x, self.model), single(y, self.model)
        with record(self.model) as trace, answering(x, y):
            answer = self.model(x)
        y = class_numbers(answer, y)
        with judging(answer, y):
            return answer, y, self.objective(answer, y, trace), trace

    def _resume(self) -> None:
        """Continue at the next batch of the restored checkpoint, if the settings of the run are the same."""
        if self._restored is None:
            return
        was = self._restored["run"]
        now = self._run
        changed = [f"{key} was {was.get(key)} and is {now[key]}" for key in now if was.get(key) != now[key]]
        if changed:
            raise CheckpointError(f"resuming needs the settings of the saved run, but {'; '.join(changed)}")
        if isinstance(self.trainer.train_dataloader, Batches):
            self.trainer.train_dataloader.load_state_dict(self._restored["batches"])
        self._restored = None

    def _check_finite(self, loss: Tensor) -> None:
        finite = bool(torch.isfinite(loss))
        if self.trainer.world_size > 1:  # all processes must stop together, or the others wait forever
            finite = self.trainer.strategy.reduce_boolean_decision(finite, all=True)
        if not finite:
            folder = next((c.folder for c in self.trainer.checkpoint_callbacks if isinstance(c, Checkpoints)), None)
            raise TrainingError(f"the loss is {loss.item()} at step {self.global_step}; {advice(folder)}")

    def _figures(self, answer: Any, y: Any, trace: Trace) -> dict[str, Tensor]:
        """Accuracies where the answer is logits and y classes, mean keeps, and the share spent."""
        figures = {}
        if (correct := _accuracy(answer, y)) is not None:
            figures["accuracy"] = correct
        for name, answers in trace.answers.items():
            for k, each in enumerate(answers):
                if (correct := _accuracy(each, y)) is not None:
                    figures[f"accuracy/{_path(name)}exit{k}"] = correct
        for name in trace.keys():
            figures[f"keep/{name or 'model'}"] = torch.stack([keep.detach().mean() for keep in trace[name]]).mean()
        if self.cost is not None and trace.calls:
            figures["spent"] = (self.cost.spent(trace).detach().mean() / self.cost.full).float()
        return figures


def _accuracy(answer: Any, y: Any) -> Tensor | None:
    """The share of correct classes; None unless these are logits (B, C, ...) and classes (B, ...)."""
    if not isinstance(answer, Tensor) or not isinstance(y, Tensor) or y.is_floating_point() or answer.dim() < 2:
        return None
    if answer.shape[:1] + answer.shape[2:] != y.shape:
        return None
    return (answer.detach().argmax(1) == y).float().mean()


def _path(name: str) -> str:
    return f"{name}/" if name else ""
