"""A run: the folder of an experiment, and what can be done with it.

config.yaml             the experiment
words.txt               of a run on sentences: its vocabulary
step-*.ckpt             training checkpoints, logs/ beside them
model/                  the trained model, never exiting early
frontier/               its table of held-out data
operating_points.json   the requested budgets
results.json            test figures
bench.csv               milliseconds
report.html             everything, to read
"""

import copy
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dynanet import report
from dynanet.bench.comparison import Row, compare
from dynanet.bench.machine import append_rows, facts
from dynanet.calibrate.budgeted import outcome
from dynanet.calibrate.frontier import Frontier, apply, calibrate
from dynanet.calibrate.operating_point import OperatingPoint
from dynanet.calibrate.table import ExitTable, exits_of, halt_of, tabulate
from dynanet.core.cost import CostModel
from dynanet.core.errors import CheckpointError, ConfigError, DynanetError, InputError, StructureError
from dynanet.core.files import write_atomically
from dynanet.datamodules.module import DataModule
from dynanet.experiment.budgets import (
    SHARES,
    RequestedBudgets,
    budget_of,
    cheapest_share,
    full_macs,
    in_words,
    operating_points,
)
from dynanet.experiment.config import Experiment
from dynanet.experiment.evaluation import AS_TRAINED, scored, settings, table_figures
from dynanet.experiment.scene import classified, exit_macs
from dynanet.export.bundles import bundle
from dynanet.export.card import Card
from dynanet.export.config import Inputs
from dynanet.tasks.task import TrainingOptions, finish_training, schedules
from dynanet.train.checkpoint import step_files
from dynanet.train.optimizers import adamw, one_cycle, sgd
from dynanet.zoo.saved import load

BATCHES = (1, 8, 64, 256)


class Run:
    """A run folder, opened.

    Data, model, frontier and test table are read or computed when they are first used, and kept until `train` or
    `calibrate` writes others. Treat them as read-only: copy a model before you change it.

    Args:
        folder: of the run.
        experiment: the configuration; read from the folder's config.yaml if None.

    Raises:
        ConfigError: no run there, or a configuration that cannot be read.
    """

    def __init__(self, folder: Path, experiment: Experiment | None = None) -> None:
        self.folder = folder
        self.experiment = experiment if experiment is not None else Experiment.read(folder / "config.yaml")

    @cached_property
    def data(self) -> DataModule:
        """The data of the experiment."""
        recipe = self.experiment.recipe
        return self.experiment.data.open(recipe.batch, recipe.seed)

    @cached_property
    def model(self) -> nn.Module:
        """The trained model, never exiting early.

        Raises:
            ConfigError: training is not finished.
            BundleError: the model is damaged.
        """
        if not (self.folder / "model").exists():
            resume = " --resume" if step_files(self.folder) else ""
            raise ConfigError(f"{self.folder} holds no trained model yet; run: dynanet train {self.folder}{resume}")
        return load(self.folder / "model")

    @cached_property
    def cost(self) -> CostModel:
        """The prices of the model's units, for samples of the data."""
        return CostModel(self.model, self.data.example())

    @cached_property
    def has_exits(self) -> bool:
        """There are thresholds to calibrate: the model has a layer with exits, and the task can be tabulated."""
        if not self.data.task.tabulated:
            return False
        try:
            return exits_of(halt_of(self.model)[1]) > 1
        except StructureError:
            return False

    @cached_property
    def frontier(self) -> Frontier:
        """The table of the last calibration, with the model.

        Raises:
            ConfigError: there is nothing to calibrate, or it was not calibrated yet.
        """
        self._check_exits()
        if not (self.folder / "frontier").is_dir():
            raise ConfigError(f"{self.folder} was not calibrated yet; run: dynanet calibrate {self.folder}")
        return Frontier.load(self.folder / "frontier", self.model)

    @cached_property
    def operating_points(self) -> list[OperatingPoint]:
        """Thresholds for the budgets of the last calibration, chosen again from its table."""
        frontier = self.frontier
        try:
            content = json.loads((self.folder / "operating_points.json").read_text())
            requested = RequestedBudgets(**content["requested"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.folder} was not calibrated yet; run: dynanet calibrate {self.folder}") from error
        return operating_points(frontier, requested)

    @cached_property
    def test_table(self) -> ExitTable:
        """Scores, answers and correctness on test data, at every exit."""
        return self._priced(tabulate(self.model, self.data.test, self.cost, ignore=self.data.task.ignore))

    @property
    def full_macs(self) -> float:
        """MACs per sample of the full model: what shares are shares of."""
        return full_macs(self.frontier) if self.has_exits else self.cost.full

    @property
    def unreachable(self) -> list[float]:
        """The customary shares of the MACs that no path of the model is as cheap as."""
        return [share for share in SHARES if share <= cheapest_share(self.frontier)]

    def train(self, *, resume: bool = False, progress: bool = True) -> dict[str, float]:
        """Train the network and save it.

        Args:
            resume: continue where a run in this folder was stopped.
            progress: show a progress bar, or a line per epoch where stderr is not a terminal.

        Returns:
            The metrics of the last epoch.

        Raises:
            CheckpointError: the folder holds a run already and `resume` is off, or another experiment and it is on.
            ConfigError: the folder holds something else, or the zoo does not have the model.
            TrainingError: the loss is NaN or infinite.
        """
        from dynanet.train.fitting import fit  # imports Lightning, which takes seconds

        self._check_free(resume)
        recipe, data = self.experiment.recipe, self.data
        data.opened  # noqa: B018  (a set that cannot be read is reported before anything is drawn or written)
        torch.manual_seed(recipe.seed)
        model = self.experiment.model.build(data)
        options = TrainingOptions(
            recipe.exit_weights, recipe.distill, recipe.label_smoothing, recipe.ponder, recipe.rate
        )
        objective = data.task.objective(model, options)
        fresh = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.experiment.save(self.folder / "config.yaml")
        data.inputs.save(self.folder)
        watched = sys.stderr.isatty()
        try:
            done = fit(
                model,
                data.train,
                data.held_out,
                objective=objective,
                epochs=recipe.epochs,
                folder=self.folder,
                optimizer=(sgd if recipe.optimizer == "sgd" else adamw)(recipe.lr, weight_decay=recipe.weight_decay),
                scheduler=one_cycle(warmup=recipe.warmup),
                schedules=schedules(model),
                seed=recipe.seed,
                monitor=data.task.monitor,
                lower_is_better=data.task.lower_is_better,
                resume=resume,
                progress=progress and watched,
                callbacks=[_lines(recipe.epochs, data.task.monitor)] if progress and not watched else [],
                trainer_options={"precision": recipe.precision},
            )
        except DynanetError:
            if fresh and not step_files(self.folder):
                shutil.rmtree(self.folder)
            raise
        finish_training(model)
        self._save(model.eval(), self.folder / "model", Card(data=data.title))
        self._forget("model", "cost", "has_exits", "frontier", "operating_points", "test_table")
        return done.metrics

    def calibrate(self, requested: RequestedBudgets) -> list[OperatingPoint]:
        """Find thresholds for budgets, in one pass over the held-out data.

        Args:
            requested: the budgets.

        Returns:
            An operating point for each.

        Raises:
            BudgetError: a share of the MACs that no path of the model has.
            ConfigError: there is nothing to calibrate, or training is not finished.
        """
        self._check_exits()
        frontier = calibrate(self.model, self.data.held_out, self.cost, ignore=self.data.task.ignore)
        frontier = replace(frontier, table=self._priced(frontier.table))
        points = operating_points(frontier, requested)
        frontier.save(self.folder / "frontier")
        (self.folder / "results.json").unlink(missing_ok=True)
        self._write("operating_points.json", {"requested": asdict(requested)})
        self._forget("frontier", "operating_points")
        self.frontier = frontier
        self.operating_points = points
        return points

    def evaluate(self) -> dict[str, Any]:
        """Measure the run on test data, and write results.json.

        With exits: the accuracy of every exit and operating point, beside random exits at the same rates. Where the
        rows of the table are parts of an answer (segmentation), whole answers are scored instead, and `points` are
        their figures. Without exits `points` holds one, of the trained network.

        Raises:
            ConfigError: training is not finished, or a model with exits was not calibrated.
        """
        if self.has_exits and not self.data.task.figures:
            found = table_figures(self.test_table, self.operating_points, self.full_macs)
        else:
            named = settings(self.frontier, self.operating_points) if self.has_exits else [(AS_TRAINED, self.model)]
            found = {"points": [scored(name, model, self.data, self.cost) for name, model in named]}
        results = {
            "data": self.data.title,
            "test_samples": self.data.test.samples,
            "full_macs": self.full_macs,
            **found,
            **facts(),
        }
        self._write("results.json", results)
        return results

    def results(self) -> dict[str, Any]:
        """The content of results.json; evaluated now if that was not done since the last calibration."""
        try:
            return json.loads((self.folder / "results.json").read_text())
        except (OSError, ValueError):
            return self.evaluate()

    def explained(self) -> tuple[nn.Module, str]:
        """The model that the report looks at in detail, and the name of its setting.

        It is at the operating point nearest to half of the MACs; without exits it is the trained model.
        """
        if not self.has_exits:
            return copy.deepcopy(self.model), AS_TRAINED
        full = self.full_macs
        point = min(self.operating_points, key=lambda each: abs(each.macs / full - 0.5))
        return apply(self.model, point), in_words(point.budget, full)

    def bench(
        self, *, share: float = 0.5, batches: Sequence[int] | None = None, threads: Sequence[int] = (1,),
        rounds: int = 7, echo: Callable[[str], None] = print,
    ) -> list[Row]:  # fmt: skip
        """Time the model at a budget on test samples, and add rows to bench.csv.

        Args:
            share: the budget, as a share of the full model's MACs; not used without exits.
            batches: samples per call; None: those of `BATCHES` that the test split can fill. Samples of different
                lengths come in the same batches to what skips nothing, each padded to its own longest sample.
            threads: numbers of threads to try.
            rounds: interleaved repetitions.
            echo: prints a line per row.
        """
        if self.has_exits:
            model, budget = self.frontier.at(budget_of(self.frontier, share)), f"{share:.0%} of the MACs"
        else:
            model, budget = copy.deepcopy(self.model), AS_TRAINED
        if batches is None:
            batches = [batch for batch in BATCHES if batch <= self.data.test.samples]
        samples = self.data.test_samples(max(256, *batches))
        cut = self.data.cut if self.data.inputs.varies else None
        rows = compare(model, samples, batches=batches, threads=threads, rounds=rounds, cut=cut, echo=echo)
        about = {"data": self.data.title, "budget": budget}
        append_rows(self.folder / "bench.csv", [asdict(row) for row in rows], about)
        return rows

    def scene(self, share: float = 0.5, *, rounds: int = 3) -> tuple[report.SceneMaps, dict[str, float]]:
        """Classify the whole scene at a budget: maps, and seconds beside those of the full model run the same way.

        Raises:
            InputError: the data has no scene.
        """
        if self.data.scene is None:
            raise InputError(f"{self.data.title} is not a scene and has no map; expected a run on indian_pines")
        return classified(self.frontier.at(budget_of(self.frontier, share)), self.data.scene, rounds=rounds)

    def export(self, folder: Path, share: float | None) -> str:
        """Save the model as a bundle.

        Args:
            folder: of the bundle.
            share: the budget, as a share of the full model's MACs; None: the full model.

        Returns:
            The bundle's fingerprint.
        """
        if share is None:
            return self._save(self.model, folder, Card(data=self.data.title))
        point = self.frontier.choose(budget_of(self.frontier, share))
        reached = outcome(self.test_table, point.thresholds)
        row = {"budget (share of the MACs)": share, "mean MACs, test": reached.macs, "accuracy, test": reached.accuracy}
        card = Card(data=self.data.title, results=[row])
        return self._save(apply(self.model, point), folder, card, reached.macs)

    def _save(self, model: nn.Module, folder: Path, card: Card, mean_macs: float | None = None) -> str:
        described = self.data.inputs.described
        folder.parent.mkdir(parents=True, exist_ok=True)
        return bundle(
            model, folder, classes=list(self.data.classes), inputs=None if described is None else Inputs(**described),
            mean_macs=mean_macs, worst_macs=CostModel(model, self.data.example()).worst, card=card,
        )  # fmt: skip

    def _priced(self, table: ExitTable) -> ExitTable:
        """The table with the prices of the real job.

        Over a scene the stem runs once per pixel, not once per patch. Of samples of different lengths, shares are
        those of the mean, not of the sample that happened to come first.
        """
        if self.data.inputs.varies:
            return replace(table, worst=table.mean_macs)
        macs = None if self.data.scene is None else exit_macs(self.model, self.data.scene)
        return table if macs is None else replace(table, macs=np.array(macs), worst=np.array(macs))

    def _check_free(self, resume: bool) -> None:
        """The folder is new, or holds this very run and `resume` is on."""
        config = self.folder / "config.yaml"
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        if not config.exists():
            raise ConfigError(f"{self.folder} is not empty and not a run; choose a new folder")
        if not resume and step_files(self.folder):
            raise CheckpointError(f"{self.folder} holds a run already; go on with --resume, or choose a new folder")
        if resume and (changed := Experiment.read(config).changes(self.experiment)):
            raise CheckpointError(
                f"resuming goes on with the run in {self.folder}, but {'; '.join(changed)}; put that back, or choose a "
                f"new folder"
            )

    def _check_exits(self) -> None:
        if self.has_exits:
            return
        if not self.data.task.tabulated:
            what = f"is a run of {type(self.data.task).__name__.lower()}"
        else:
            what = f"holds a {type(self.model).__name__}, which has no layer that halts"
        raise ConfigError(
            f"{self.folder} {what}, so it has no thresholds to calibrate; run: dynanet evaluate {self.folder}"
        )

    def _write(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, default=float)
        write_atomically(self.folder / name, lambda file: file.write(text.encode()))

    def _forget(self, *names: str) -> None:
        for name in names:
            vars(self).pop(name, None)


def _lines(epochs: int, monitor: str) -> Any:
    """A callback that prints a line per epoch."""
    from lightning.pytorch.callbacks import Callback

    class Lines(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            shown = [f"{name} {metrics[name]:.3f}" for name in ("train/loss", monitor) if name in metrics]
            print(f"  epoch {trainer.current_epoch + 1}/{epochs}  {'  '.join(shown)}", file=sys.stderr, flush=True)

    return Lines()
