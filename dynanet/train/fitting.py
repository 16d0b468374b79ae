"""Train a model in a folder of checkpoints, so that a run that was killed can be resumed."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from dynanet.core.cost import CostModel
from dynanet.core.errors import CheckpointError, ConfigError, check_sizes
from dynanet.core.objective import Objective
from dynanet.train.batches import Batches
from dynanet.train.checkpoint import newest, step_files, sweep
from dynanet.train.lightning import TrainingModule
from dynanet.train.optimizers import OptimizerFactory, SchedulerFactory, sgd
from dynanet.train.saving import AtomicCheckpointIO, Checkpoints
from dynanet.train.schedules import Setting


@dataclass(frozen=True)
class FitResult:
    """A finished run.

    Attributes:
        model: after the last step; `load_weights(model, result.best)` loads the best epoch.
        last: the last checkpoint.
        best: the checkpoint of the best epoch; None without a validation set, or where that checkpoint is lost.
        metrics: the last values of all that was logged.
        trainer: Lightning's Trainer.
    """

    model: nn.Module
    last: Path | None
    best: Path | None
    metrics: dict[str, float]
    trainer: Trainer


def fit(
    model: nn.Module,
    train_loader: Batches | DataLoader,
    val_loader: Batches | DataLoader | None = None,
    *,
    objective: Objective,
    epochs: int,
    folder: str | Path,
    lr: float | None = None,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    schedules: Sequence[Setting] = (),
    cost: CostModel | None = None,
    equilibrium: bool = False,
    seed: int = 0,
    resume: bool = False,
    checkpoint_every: int | None = None,
    monitor: str = "val/accuracy",
    lower_is_better: bool = False,
    callbacks: Sequence[Callback] = (),
    devices: int | str | list[int] = 1,
    accelerator: str = "auto",
    strategy: Any = "auto",
    progress: bool = True,
    trainer_options: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train a model, in a folder that holds its checkpoints and logs.

    If the run is killed, the same call with `resume=True` continues from the last checkpoint, on the CPU bit for bit.

    Args:
        model: any module; trained in place, and in train mode afterwards.
        train_loader: `Batches`, or a DataLoader over a map-style dataset, which `Batches.of` converts.
        val_loader: the same, for the metrics of every epoch.
        objective: the loss to minimise.
        epochs: passes over the training data.
        folder: holds `step-*.ckpt`, `best.ckpt`, `logs/version_*/metrics.csv` (a version for every start), and
            `tensorboard/` if that is installed.
        lr: of the default optimizer, 0.1 if None.
        optimizer: see `TrainingModule`; instead of lr.
        scheduler: see `TrainingModule`.
        schedules: see `TrainingModule`.
        cost: see `TrainingModule`.
        equilibrium: see `TrainingModule`.
        seed: of the order of a DataLoader's data, and of what training draws.
        resume: continue from the folder's last intact checkpoint, or start if there is none.
        checkpoint_every: also save every this many steps, not only after every epoch.
        monitor: the metric whose highest value makes the best epoch, where there is a val_loader.
        lower_is_better: for a monitor that is a loss.
        callbacks: further Lightning callbacks.
        devices: as in Lightning's Trainer.
        accelerator: as in Lightning's Trainer.
        strategy: as in Lightning's Trainer: "ddp" for one process per device; "ddp_find_unused_parameters_true" where
            some weights get no gradient (exits that are switched off).
        progress: show a progress bar.
        trainer_options: any other of the Trainer's arguments.

    Raises:
        CheckpointError: the folder holds a run already and `resume` is off; all its checkpoints are damaged; they are
            of another model or run; the disk is full.
        ConfigError: both lr and optimizer, a loader that cannot be resumed, a monitor that is not logged, epochs or
            `checkpoint_every` below 1; under "ddp", weights that get no gradient.
        TrainingError: the loss is NaN or infinite.
    """
    if lr is not None and optimizer is not None:
        raise ConfigError("got both lr and optimizer; set the learning rate of the optimizer itself: sgd(lr)")
    check_sizes(epochs=epochs)
    if checkpoint_every is not None:
        check_sizes(checkpoint_every=checkpoint_every)
    folder = Path(folder)
    saving = Checkpoints(folder, every_steps=checkpoint_every, monitor=monitor, lower_is_better=lower_is_better)
    setup = _Setup(epochs, devices, accelerator, strategy, [*callbacks, saving], folder, progress)
    _check_options(trainer_options or {})
    batches = Batches.of(train_loader, seed)
    held_out = [] if val_loader is None else [Batches.of(val_loader, seed)]
    start = _prepare(folder, resume)
    training = TrainingModule(
        model,
        objective,
        optimizer=optimizer if optimizer is not None else sgd(0.1 if lr is None else lr),
        scheduler=scheduler,
        schedules=schedules,
        cost=cost,
        equilibrium=equilibrium,
        seed=seed,
    )
    with _quiet(), _all_used(model):
        trainer = setup.trainer(len(batches), validates=bool(held_out), options=trainer_options or {})
        model.train()
        trainer.fit(training, batches, held_out, ckpt_path=start)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return FitResult(model, newest(folder), saving.best_file(), metrics, trainer)


@dataclass(frozen=True)
class _Setup:
    """What `fit` passes on to Lightning's Trainer, under the Trainer's names."""

    max_epochs: int
    devices: int | str | list[int]
    accelerator: str
    strategy: Any
    callbacks: list[Callback]
    default_root_dir: Path
    enable_progress_bar: bool

    def trainer(self, steps: int, *, validates: bool, options: Mapping[str, Any]) -> Trainer:
        """A Trainer for epochs of `steps` batches; `options` override the defaults below."""
        defaults = {
            "logger": _loggers(self.default_root_dir),
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": None if validates else 0,  # else Lightning warns of an empty list of loaders
            "log_every_n_steps": min(10, steps),
        }
        return Trainer(
            **vars(self),
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,  # Batches distributes the data itself
            **{**defaults, **options},
        )


def _check_options(options: Mapping[str, Any]) -> None:
    reserved = {each.name for each in fields(_Setup)} | {"plugins", "enable_checkpointing", "use_distributed_sampler"}
    taken = sorted(reserved & options.keys())
    if taken:
        raise ConfigError(f"trainer_options set {taken}, which fit sets itself; use fit's own arguments for these")


def _prepare(folder: Path, resume: bool) -> Path | None:
    """Make the folder ready to save in, and return the checkpoint to continue from."""
    folder.mkdir(parents=True, exist_ok=True)
    if not resume and step_files(folder):
        raise CheckpointError(
            f"{folder} holds a run already, up to step {max(step_files(folder))}; resume it, or choose another folder"
        )
    sweep(folder)
    return newest(folder) if resume else None


def _loggers(folder: Path) -> list[Logger]:
    loggers: list[Logger] = [CSVLogger(folder, name="logs")]
    if find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(folder, name="tensorboard"))
    return loggers


@contextmanager
def _all_used(model: nn.Module) -> Iterator[None]:
    """Say what to do where processes wait for gradients that never come."""
    try:
        yield
    except RuntimeError as error:
        if "parameters that were not used" not in str(error):  # as Lightning words it, after torch's own words
            raise
        idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        raise ConfigError(
            f"{len(idle)} weights get no gradient ({', '.join(idle[:3])}{', ...' if len(idle) > 3 else ''}), as of an "
            f'exit that is switched off, and strategy "ddp" waits for one; give strategy='
            f'"ddp_find_unused_parameters_true", or freeze them with requires_grad_(False)'
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Lightning's remarks on hardware and its advertisements, but not its warnings.

    Except one that users cannot act on: Lightning uses a function that torch has deprecated.
    """
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            yield
    finally:
        log.setLevel(before)
