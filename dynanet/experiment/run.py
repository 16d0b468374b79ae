"""A run is a folder: what was trained, at which budgets it can work, what that reaches, how fast it is.

config.yaml       the experiment
words.txt         of a run on sentences: its vocabulary
step-*.ckpt       training checkpoints, logs/ beside them
model/            the trained model, never exiting early
frontier/         its table of held-out data
choices.json      the budgets asked for, and the thresholds found
results.json      what they reach on test data
bench.csv         what they are worth in milliseconds
report.html       all of it, to read: `reports.py`
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dynanet import report, zoo
from dynanet.bench.comparison import Row, compare
from dynanet.bench.machine import append_rows, facts
from dynanet.calibrate.anytime import random_exits
from dynanet.calibrate.budgeted import outcome
from dynanet.calibrate.frontier import Frontier, apply, calibrate, with_thresholds
from dynanet.calibrate.operating_point import OperatingPoint
from dynanet.calibrate.table import ExitTable, exits_of, halt_of, tabulate
from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute
from dynanet.core.errors import BudgetError, CheckpointError, ConfigError, DynanetError, InputError, StructureError
from dynanet.core.files import write_atomically
from dynanet.experiment.config import Experiment, Problem, build, open_problem
from dynanet.experiment.problem import WORDS
from dynanet.experiment.scene import PRICED, classified
from dynanet.export.bundles import bundle
from dynanet.export.card import Card
from dynanet.export.config import Inputs
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.report import words
from dynanet.tasks.task import TrainingOptions, with_random_exits
from dynanet.train.checkpoint import step_files
from dynanet.train.optimizers import adamw, one_cycle, sgd
from dynanet.zoo.saved import load

Tell = Callable[[str], None]
SHARES = (0.75, 0.5, 0.25)
BATCHES = (1, 8, 64, 256)
AS_TRAINED = "as trained"


@dataclass(frozen=True)
class RequestedBudgets:
    """The budgets of a run.

    Attributes:
        shares: of the full model's MACs; None: `SHARES`, as far as a path is that cheap.
        risk: share of samples that may lose the full model's right answer; None: no such budget.
        confidence: with which the risk is promised.
    """

    shares: Sequence[float] | None = None
    risk: float | None = 0.05
    confidence: float = 0.9

    def __post_init__(self) -> None:
        for value in (*(self.shares or ()), self.confidence, *([] if self.risk is None else [self.risk])):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"a budget of {value!r} was asked for; expected numbers")


class Run:
    """A run folder, opened.

    Args:
        folder: of the run.
        experiment: what it is about; read from the folder's config.yaml if None.

    Raises:
        ConfigError: no run there, or a configuration that cannot be read.
    """

    def __init__(self, folder: Path, experiment: Experiment | None = None) -> None:
        self.folder = folder
        self.experiment = experiment if experiment is not None else Experiment.read(folder / "config.yaml")
        self._problem: Problem | None = None

    @property
    def problem(self) -> Problem:
        """The data, opened when first asked for."""
        if self._problem is None:
            recipe = self.experiment.recipe
            self._problem = open_problem(self.experiment.data, recipe.batch, recipe.seed)
        return self._problem

    def train(self, *, resume: bool = False, progress: bool = True) -> dict[str, float]:
        """Train, and save the model. Answers the last metrics.

        Raises:
            CheckpointError: the folder holds a run already and `resume` is off, or another experiment and it is on.
            ConfigError: the folder holds something else, or there is no such model.
            TrainingError: the loss is NaN or infinite.
        """
        from dynanet.train.fitting import fit  # Lightning takes seconds to import: only who trains pays

        self._check_free(resume)
        recipe, problem = self.experiment.recipe, self.problem
        torch.manual_seed(recipe.seed)
        model = build(self.experiment.model, problem)
        asked = TrainingOptions(recipe.exit_weights, recipe.distill, recipe.label_smoothing, recipe.ponder, recipe.rate)
        objective = problem.task.objective(model, asked)
        fresh = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.experiment.save(self.folder / "config.yaml")
        if problem.vocabulary is not None:
            problem.vocabulary.write(self.folder / WORDS)
        try:
            done = fit(
                model,
                problem.train,
                problem.held_out,
                objective=objective,
                epochs=recipe.epochs,
                folder=self.folder,
                optimizer=(sgd if recipe.optimizer == "sgd" else adamw)(recipe.lr, weight_decay=recipe.weight_decay),
                scheduler=one_cycle(warmup=recipe.warmup),
                schedules=problem.task.schedules(model),
                seed=recipe.seed,
                monitor=problem.task.monitor,
                lower_is_better=problem.task.lower_is_better,
                resume=resume,
                progress=progress and sys.stderr.isatty(),
                callbacks=[_lines(recipe.epochs, problem.task.monitor)] if progress and not sys.stderr.isatty() else [],
                trainer_options={"precision": recipe.precision},
            )
        except DynanetError:
            if fresh and not step_files(self.folder):
                shutil.rmtree(self.folder)
            raise
        problem.task.finish(model)
        self._save(model.eval(), self.folder / "model", Card(data=problem.title))
        return done.metrics

    def _check_free(self, resume: bool) -> None:
        """The folder is new, or holds this very run and is to go on."""
        config = self.folder / "config.yaml"
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        if not config.exists():
            raise ConfigError(f"{self.folder} holds something that is no run; choose a new folder")
        if not resume and step_files(self.folder):
            raise CheckpointError(f"{self.folder} holds a run already; go on with --resume, or choose a new folder")
        if resume and (changed := Experiment.read(config).changes(self.experiment)):
            raise CheckpointError(
                f"resuming goes on with the run in {self.folder}, but {'; '.join(changed)}; put that back, or choose a "
                f"new folder"
            )

    def model(self) -> nn.Module:
        """The trained model, never exiting early.

        Raises:
            ConfigError: training has not come to its end.
            BundleError: the model is damaged.
        """
        if not (self.folder / "model").exists():
            begun = " --resume" if step_files(self.folder) else ""
            raise ConfigError(f"{self.folder} holds no trained model yet; run: dynanet train {self.folder}{begun}")
        return load(self.folder / "model")

    def calibrate(self, asked: RequestedBudgets) -> list[OperatingPoint]:
        """One pass over the held-out data; then thresholds for every budget.

        Raises:
            ConfigError: nothing is calibrated for this task, or training has not come to its end.
        """
        self._check_exits()
        model, problem = self.model(), self.problem
        cost = CostModel(model, problem.example())
        frontier = calibrate(model, problem.held_out, cost, ignore=problem.task.ignore)
        frontier = self._as_used(frontier)
        choices = _choose(frontier, asked)
        frontier.save(self.folder / "frontier")
        (self.folder / "results.json").unlink(missing_ok=True)
        _write_json(self.folder / "choices.json", {"asked": asdict(asked)})
        return choices

    def choices(self) -> list[OperatingPoint]:
        """The choices of the last calibration, made again from its table."""
        frontier = self.frontier()
        try:
            asked = RequestedBudgets(**json.loads((self.folder / "choices.json").read_text())["asked"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.folder} was not calibrated yet; run: dynanet calibrate {self.folder}") from error
        return _choose(frontier, asked)

    def full_macs(self) -> float:
        """MACs per sample of the full model: what shares are shares of."""
        return _full(self.frontier())

    def unreachable(self) -> list[float]:
        """The customary shares of the MACs that no path of this model is as cheap as."""
        return [share for share in SHARES if share <= _cheapest(self.frontier())]

    def frontier(self) -> Frontier:
        """The table of the last calibration, with the model."""
        self._check_exits()
        if not (self.folder / "frontier").is_dir():
            self.model()
            raise ConfigError(f"{self.folder} was not calibrated yet; run: dynanet calibrate {self.folder}")
        return Frontier.load(self.folder / "frontier", self.model())

    def evaluate(self) -> dict[str, Any]:
        """Test accuracy of every exit and every choice, beside random exits of the same rates.

        Where a sample's answer has many rows (segmentation), whole answers are scored, and `points` are their figures.
        Of a task that is not tabulated, and of a network without exits: its figures and MACs, as `points`.
        """
        if not self.has_exits():
            return self._scored()
        if self.problem.task.figures:
            return self._scored_at_choices()
        frontier, table = self.frontier(), self.test_table()
        full = table.accuracy[-1]
        rows = []
        for choice in self.choices():
            reached = outcome(table, choice.thresholds)
            rows.append(
                {
                    "asked": in_words(choice.budget, _full(frontier)),
                    "asked_macs": choice.budget.macs,
                    "held_out_macs": choice.macs,
                    "test_macs": reached.macs,
                    "test_macs_share": reached.macs / _full(frontier),
                    "test_accuracy": reached.accuracy,
                    "lost": full - reached.accuracy,
                    "random_exits_accuracy": random_exits(table, reached.share).accuracy,
                    "shares": reached.share.tolist(),
                    "note": choice.note,
                }
            )
        results = {
            "data": self.problem.title,
            "test_samples": table.samples,
            "full_macs": _full(frontier),
            "macs_per_exit": table.mean_macs.tolist(),
            "accuracy_per_exit": table.accuracy.tolist(),
            "choices": rows,
            **facts(),
        }
        _write_json(self.folder / "results.json", results)
        return results

    def results(self) -> dict[str, Any]:
        """What `evaluate` wrote; evaluated now if it has not been since the last calibration."""
        try:
            return json.loads((self.folder / "results.json").read_text())
        except (OSError, ValueError):
            return self.evaluate()

    def explained(self) -> tuple[nn.Module, str]:
        """The model to look at in detail, and the name of its point: at the choice nearest to half of the MACs, as it
        was trained where there are no choices.
        """
        if not self.has_exits():
            return self.model(), AS_TRAINED
        frontier, full = self.frontier(), self.full_macs()
        choice = min(self.choices(), key=lambda each: abs(each.macs / full - 0.5))
        return apply(frontier.model, choice), in_words(choice.budget, full)

    def has_exits(self) -> bool:
        """There are thresholds to calibrate; what decides by what it has learnt, or not at all, has none."""
        if not self.problem.task.tabulated:
            return False
        try:
            return exits_of(halt_of(self.model())[1]) > 1
        except StructureError:
            return False

    def _check_exits(self) -> None:
        if self.has_exits():
            return
        if not self.problem.task.tabulated:
            what = f"is a run of {type(self.problem.task).__name__.lower()}"
        else:
            what = f"holds a {type(self.model()).__name__}, which has no layer that halts"
        raise ConfigError(
            f"{self.folder} {what}: there are no thresholds to calibrate; run: dynanet evaluate {self.folder}"
        )

    def _scored(self) -> dict[str, Any]:
        """What the model as it is reaches on test data, run sparsely."""
        model, problem = execute(self.model(), sparse=True), self.problem
        cost = CostModel(model, problem.example())
        score = problem.task.score(model, problem.test, cost)
        by_class = {figure: dict(zip(problem.classes, each, strict=True)) for figure, each in score.by_class.items()}
        results = {
            "data": problem.title,
            "test_samples": problem.test.samples,
            "full_macs": cost.full,
            "points": [{"name": AS_TRAINED, "macs": score.macs, **score.figures, "by_class": by_class}],
            **facts(),
        }
        _write_json(self.folder / "results.json", results)
        return results

    def _scored_at_choices(self) -> dict[str, Any]:
        """Whole answers, at the thresholds of every choice: every exit alone, the choices, and exits drawn by lot."""
        frontier, problem = self.frontier(), self.problem
        cost, exits = CostModel(frontier.model, problem.example()), frontier.table.exits
        asked = []
        for k in range(exits):
            thresholds = np.full(exits - 1, np.inf)
            thresholds[k:] = -np.inf
            asked.append((f"all at exit {k + 1}", frontier.model, thresholds))
        for choice in self.choices():
            name = in_words(choice.budget, _full(frontier))
            asked += [(name, frontier.model, choice.thresholds)]
            asked += [(f"{name}, exits drawn by lot", *with_random_exits(frontier.model, choice.share))]
        points = []
        for name, model, thresholds in asked:
            score = problem.task.score(execute(with_thresholds(model, thresholds), sparse=True), problem.test, cost)
            by_class = {each: dict(zip(problem.classes, of, strict=True)) for each, of in score.by_class.items()}
            points.append({"name": name, "macs": score.macs, **score.figures, "by_class": by_class})
        results = {
            "data": problem.title,
            "test_samples": problem.test.samples,
            "full_macs": _full(frontier),
            "points": points,
            **facts(),
        }
        _write_json(self.folder / "results.json", results)
        return results

    def test_table(self) -> ExitTable:
        """Scores, answers and correctness on test data, at every exit."""
        model = self.model()
        cost = CostModel(model, self.problem.example())
        table = tabulate(model, self.problem.test, cost, ignore=self.problem.task.ignore)
        return self._as_used(Frontier(model, table)).table

    def bench(
        self, *, share: float = 0.5, batches: Sequence[int] | None = None, threads: Sequence[int] = (1,),
        rounds: int = 7, echo: Tell = print,
    ) -> list[Row]:  # fmt: skip
        """Time the model at a budget, on test samples; rows go to bench.csv.

        Batches are `BATCHES`, as far as there are so many test samples, if None. Of samples of different lengths what
        skips nothing gets the same batches, each padded to its own longest sample.
        """
        if self.has_exits():
            frontier = self.frontier()
            model, budget = frontier.at(_budget(frontier, share)), f"{share:.0%} of the MACs"
        else:
            model, budget = self.model(), "as trained"
        if batches is None:
            batches = [batch for batch in BATCHES if batch <= self.problem.test.samples]
        samples = self.problem.test_samples(max(256, *batches))
        cut = None if self.problem.kind == "images" else self.problem.cut
        rows = compare(model, samples, batches=batches, threads=threads, rounds=rounds, cut=cut, echo=echo)
        about = {"data": self.problem.title, "budget": budget}
        append_rows(self.folder / "bench.csv", [asdict(row) for row in rows], about)
        return rows

    def scene(self, share: float = 0.5, *, rounds: int = 3) -> tuple[report.SceneMaps, dict[str, float]]:
        """Classify the whole scene at a budget: maps, and seconds beside those of the full model run the same way.

        Raises:
            InputError: the data is no scene.
        """
        pines = self.problem.scene
        if pines is None:
            raise InputError(f"{self.problem.title} is no scene: there is no map to make")
        frontier = self.frontier()
        return classified(frontier.at(Budget(macs=share * _full(frontier))), pines, rounds=rounds)

    def export(self, folder: Path, share: float | None) -> str:
        """Save the model as a bundle, at a budget if one is given. Answers its fingerprint."""
        frontier = self.frontier() if share is not None else None
        if frontier is None or share is None:
            return self._save(self.model(), folder, Card(data=self.problem.title))
        choice = frontier.choose(_budget(frontier, share))
        reached = outcome(self.test_table(), choice.thresholds)
        rows = [
            {"budget (share of the MACs)": share, "mean MACs, test": reached.macs, "accuracy, test": reached.accuracy}
        ]
        card = Card(data=self.problem.title, results=rows)
        return self._save(apply(frontier.model, choice), folder, card, mean_macs=reached.macs)

    def _save(self, model: nn.Module, folder: Path, card: Card, mean_macs: float | None = None) -> str:
        problem = self.problem
        cost = CostModel(model, problem.example())
        folder.parent.mkdir(parents=True, exist_ok=True)
        return bundle(
            model, folder, classes=list(problem.classes),
            inputs=_inputs(problem),
            mean_macs=mean_macs, worst_macs=cost.worst, card=card,
        )  # fmt: skip

    def _as_used(self, frontier: Frontier) -> Frontier:
        """Prices of the job: over a scene the stem runs once per pixel, not once per patch; of what has different
        lengths, shares are those of the mean, not of the sample that happened to be first.
        """
        if self.problem.kind != "images":
            return Frontier(frontier.model, replace(frontier.table, worst=frontier.table.mean_macs))
        pines = self.problem.scene
        if pines is None or not isinstance(frontier.model, EarlyExit) or frontier.model.steps < 2:
            return frontier
        macs = zoo.scene_macs(frontier.model, pines.cube[None, :, :PRICED, :PRICED], pines.patch)
        return Frontier(frontier.model, replace(frontier.table, macs=macs, worst=macs))


def _inputs(problem: Problem) -> Inputs | None:
    """What a bundle says of its inputs."""
    if problem.kind == "sentences":
        return None
    return Inputs(problem.channels, problem.size if problem.kind == "images" else None, problem.mean, problem.std)


def in_words(asked: Budget, full_macs: float) -> str:
    """A budget of a run as one says it: "50 % of the MACs"."""
    if asked.risk is not None:
        return f"risk {words.short_percent(asked.risk)}, confidence {words.short_percent(asked.confidence)}"
    assert asked.macs is not None
    return f"{words.short_percent(asked.macs / full_macs)} of the MACs"


def _choose(frontier: Frontier, asked: RequestedBudgets) -> list[OperatingPoint]:
    shares = asked.shares
    if shares is None:
        shares = [share for share in SHARES if share > _cheapest(frontier)]
    choices = [frontier.choose(_budget(frontier, share)) for share in shares]
    if asked.risk is not None and frontier.table.groups is None:  # positions are not independent
        choices.append(frontier.choose(Budget(risk=asked.risk, confidence=asked.confidence)))
    return choices


def _cheapest(frontier: Frontier) -> float:
    return float(frontier.table.mean_macs[0]) / _full(frontier)


def _budget(frontier: Frontier, share: float) -> Budget:
    low, high = frontier.table.mean_macs[[0, -1]] / _full(frontier)
    if not low * (1 - 1e-9) <= share <= high * (1 + 1e-9):
        where = "above the dearest" if share > high else "below the cheapest"
        raise BudgetError(
            f"a share of {share:g} is {where} path: this model can spend {low:.3f} to {high:.3f} of its full MACs; ask "
            f"within that"
        )
    return Budget(macs=share * _full(frontier))


def _full(frontier: Frontier) -> float:
    return float(frontier.table.most_expensive[-1])


def _lines(epochs: int, monitor: str) -> Any:
    """A line per epoch, for those who do not watch a terminal."""
    from lightning.pytorch.callbacks import Callback

    class Lines(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            shown = [f"{name} {metrics[name]:.3f}" for name in ("train/loss", monitor) if name in metrics]
            print(f"  epoch {trainer.current_epoch + 1}/{epochs}  {'  '.join(shown)}", file=sys.stderr, flush=True)

    return Lines()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, default=float)
    write_atomically(path, lambda file: file.write(text.encode()))
