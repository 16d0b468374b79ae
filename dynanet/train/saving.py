"""Checkpoints of Lightning runs: when and how they are written, and which are kept."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import CheckpointIO
from typing_extensions import override

from dynanet.core.errors import CheckpointError, ConfigError, TrainingError
from dynanet.core.files import write_atomically
from dynanet.train.checkpoint import is_whole, load_checkpoint, newest, save_checkpoint, step_file, step_files


class AtomicCheckpointIO(CheckpointIO):
    """Lets a Trainer save atomically, with a checksum, and load without running code.

    `Trainer(plugins=[AtomicCheckpointIO()])`. Lightning's own plugin writes to TMPDIR first, and a file on another file
    system cannot be renamed atomically.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, as `train.save_checkpoint` does."""
        save_checkpoint(checkpoint, path)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU, always with weights only."""
        return load_checkpoint(path)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint if it exists."""
        Path(path).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Saves at the end of every epoch, optionally every few steps, and keeps the last two checkpoints and the best.

    `step-00000120.ckpt` is the state after 120 optimizer steps, `best.ckpt` a copy of the epoch's with the best metric.
    A run that goes on after it was stopped between the two makes the copy first.

    Args:
        folder: to save in.
        every_steps: also save every this many steps; None: only at the end of epochs.
        monitor: the metric that chooses `best.ckpt`; without a validation set none is written.
        lower_is_better: the best epoch has the lowest metric instead of the highest.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_steps: int | None = None,
        monitor: str = "val/accuracy",
        lower_is_better: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.every_steps = every_steps
        self.monitor = monitor
        self.lower_is_better = lower_is_better
        self.best: float | None = None
        self.best_step: int | None = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every `every_steps` steps, except after an epoch's last batch, where `on_train_epoch_end` saves."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0  # accumulated gradients are not saved
        if self.every_steps and stepped and trainer.global_step % self.every_steps == 0 and not trainer.is_last_batch:
            self._save(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, and copy the checkpoint to `best.ckpt` if its metric is the best so far.

        Raises:
            ConfigError: the monitored metric was not logged.
        """
        score = trainer.callback_metrics.get(self.monitor)
        better = score is not None and self._is_better(float(score))
        if score is not None and better:
            self.best = float(score)  # before saving: a resumed run must know it
            self.best_step = trainer.global_step
        self._save(trainer, pl_module)
        if score is None and trainer.val_dataloaders:
            logged = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise ConfigError(f"monitor is {self.monitor!r}, which is not logged; use one of {logged}")
        if better and trainer.is_global_zero:
            self._copy_best()

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make `best.ckpt` up for, where the run was stopped after an epoch was saved and before it was copied."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            return
        self.load_state_dict(state)
        if trainer.is_global_zero and self.best is not None and self.best_file() is None:
            self._copy_best()

    def best_file(self) -> Path | None:
        """The path of `best.ckpt`; None unless the file is whole and of the best epoch of this run."""
        path = self.folder / "best.ckpt"
        if self.best is None or not is_whole(path):
            return None
        saved = load_checkpoint(path)
        state = saved.get("callbacks", {}).get(self.state_key, {})
        right = (state.get("best"), state.get("best_step")) == (self.best, self.best_step)
        return path if right and self.best_step in (None, saved.get("global_step")) else None

    @override
    def state_dict(self) -> dict[str, Any]:
        """The best metric so far, and the step after which it was measured."""
        return {"best": self.best, "best_step": self.best_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best metric so far."""
        self.best = state_dict["best"]
        self.best_step = state_dict.get("best_step")  # None in runs of dynanet before it was kept

    def _copy_best(self) -> None:
        """Copy the checkpoint of the best epoch to `best.ckpt`, if it is kept still and whole."""
        source = None if self.best_step is None else step_file(self.folder, self.best_step)
        if source is not None and is_whole(source):
            with open(source, "rb") as saved:
                _write_copy(saved, self.folder / "best.ckpt")

    def _is_better(self, score: float) -> bool:
        if math.isnan(score):
            return False
        return self.best is None or (score < self.best if self.lower_is_better else score > self.best)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        for name, weight in pl_module.named_parameters():
            if not torch.isfinite(weight).all():
                raise TrainingError(f"{name} is not finite after step {step}; {advice(self.folder)}")
        trainer.save_checkpoint(step_file(self.folder, step))
        if trainer.is_global_zero:
            for old in sorted(step_files(self.folder))[:-2]:
                step_file(self.folder, old).unlink(missing_ok=True)


def advice(folder: str | Path | None) -> str:
    """What to do about a loss or a weight that is not finite, naming the last good checkpoint."""
    last = None
    try:
        last = newest(folder) if folder is not None else None
    except CheckpointError:
        pass
    back = f"the last good checkpoint is {last}" if last else "no checkpoint was saved yet"
    return f"{back}; lower the learning rate or clip gradients, and check the data for NaN"


def _write_copy(source: Any, path: Path) -> None:
    try:
        write_atomically(path, lambda file: shutil.copyfileobj(source, file))
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; what was there is untouched: make room and resume"
        ) from error
