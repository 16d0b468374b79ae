"""A run's folder: what it holds, what can be made of it again, and what an accident leaves."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dynanet.calibrate.frontier import apply
from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import record
from dynanet.core.errors import BudgetError, CheckpointError, ConfigError, InputError, TrainingError
from dynanet.experiment import Data, Experiment, Model, Recipe, RequestedBudgets, Run
from dynanet.train.checkpoint import step_files

TINY = Model("staged_resnet", {"widths": [4, 8], "depths": [1, 1], "context": 4})
DIGITS = Experiment(Data("digits"), TINY, Recipe(epochs=1))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_training_and_calibrating_leave(run):
    left = names(run.folder)
    assert {"config.yaml", "model", "best.ckpt", "logs", "frontier", "operating_points.json"} <= left
    assert not {"results.json", "bench.csv", "report.html"} & left
    assert len(step_files(run.folder)) == 2
    assert run.experiment.model.arguments == TINY.arguments


def test_it_learns_and_the_figures_are_those_of_the_model_really_run(run):
    results = run.evaluate()
    assert results["accuracy_per_exit"][-1] > 0.6 > 0.1 and results["test_samples"] == 360
    assert json.loads((run.folder / "results.json").read_text()) == results
    choice, row = run.operating_points[0], results["operating_points"][0]
    model = apply(run.model, choice)
    cost = CostModel(model, run.data.example())
    x, y = (torch.cat(parts) for parts in zip(*run.data.test, strict=True))
    with torch.no_grad(), record(model) as trace:
        right = (model(x).argmax(1) == y).double().mean().item()
    assert row["requested"] == "75 % of the MACs"
    assert row["test_accuracy"] == pytest.approx(right)
    assert row["test_macs"] == pytest.approx(cost.spent(trace).mean().item())
    assert row["test_macs_share"] == pytest.approx(row["test_macs"] / cost.worst)
    assert row["lost"] == pytest.approx(results["accuracy_per_exit"][-1] - right)


def test_choices_are_made_again_from_the_table(run):
    made = run.calibrate(RequestedBudgets(shares=(0.7, 0.9), risk=0.2, confidence=0.8))
    again = Run(run.folder).operating_points
    assert [choice.budget for choice in again] == [choice.budget for choice in made] and len(made) == 3
    for one, other in zip(made, again, strict=True):
        np.testing.assert_array_equal(one.thresholds, other.thresholds)
    assert made[2].budget == Budget(risk=0.2, confidence=0.8)
    assert len(run.calibrate(RequestedBudgets(shares=(), risk=None))) == 0


def test_the_usual_shares_are_those_a_path_allows(run):
    cheapest = run.frontier.table.mean_macs[0] / run.full_macs
    assert 0.5 < cheapest < 0.75
    assert [choice.budget.macs for choice in run.calibrate(RequestedBudgets(risk=None))] == [0.75 * run.full_macs]


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.1, 1.2, float("nan"), float("inf")])
def test_shares_that_no_path_has(share, run, tmp_path):
    for ask in (
        lambda: run.calibrate(RequestedBudgets(shares=(share,))),
        lambda: run.bench(share=share),
        lambda: run.export(tmp_path / "bundle", share),
    ):
        with pytest.raises(BudgetError, match=r"of its full MACs; ask within that"):
            ask()
    assert not (tmp_path / "bundle").exists() and len(run.operating_points) == 2
    shutil.rmtree(run.folder / "frontier")
    with pytest.raises(BudgetError):
        run.calibrate(RequestedBudgets(shares=(share,)))
    assert not (run.folder / "frontier").exists()


def test_the_dearest_share_is_the_whole_model(run):
    (choice,) = run.calibrate(RequestedBudgets(shares=(1.0,), risk=None))
    assert choice.accuracy >= run.frontier.table.accuracy[-1]


def test_an_exported_model_is_the_chosen_one(run, tmp_path):
    run.export(tmp_path / "bundle", 0.75)
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "handwritten" in card or "digits" in card
    from dynanet.zoo.saved import read

    bundle, choice = read(tmp_path / "bundle"), run.operating_points[0]
    assert bundle.model.thresholds.tolist() == pytest.approx(choice.thresholds.tolist())
    assert bundle.classes == [str(i) for i in range(10)] and bundle.inputs.size == (8, 8)
    assert bundle.mean_macs == pytest.approx(run.evaluate()["operating_points"][0]["test_macs"])


def test_a_run_is_not_trained_over(run):
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="holds a run already"):
        Run(run.folder, DIGITS).train()
    with pytest.raises(CheckpointError, match="recipe.epochs was 6 and is 1; .*put that back"):
        Run(run.folder, replace(run.experiment, recipe=replace(run.experiment.recipe, epochs=1))).train(resume=True)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not empty and not a run"):
        Run(tmp_path, DIGITS).train()
    assert names(tmp_path) == {"thesis.tex"}


def test_an_empty_folder_and_one_cut_off_before_the_first_checkpoint_will_do(tmp_path):
    DIGITS.save(tmp_path / "config.yaml")
    assert Run(tmp_path, DIGITS).train(progress=False)["val/accuracy"] >= 0
    assert (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize("resume", [True, False])
def test_training_that_fails_at_once_leaves_nothing(resume, tmp_path):
    wild = replace(DIGITS, recipe=Recipe(epochs=1, lr=1e30, warmup=0.0))
    with pytest.raises(TrainingError, match="the loss is|not finite"):
        Run(tmp_path / "new", wild).train(progress=False, resume=resume)
    assert names(tmp_path) == set()


def test_training_is_the_same_again(tmp_path):
    runs = [Run(tmp_path / name, DIGITS) for name in ("one", "two")]
    for run in runs:
        run.train(progress=False)
    one, two = (run.model.state_dict() for run in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_lines_of_progress_for_those_who_do_not_watch(tmp_path, capsys):
    Run(tmp_path / "new", DIGITS).train()
    out, err = capsys.readouterr()
    assert out == "" and "  epoch 1/1  " in err and "val/accuracy 0." in err


def test_digits_are_no_scene(run):
    with pytest.raises(InputError, match="is not a scene"):
        run.scene()


def test_a_whole_scene_is_classified_as_its_patches_are(tmp_path):
    pytest.importorskip("tensorly")
    small = Model("spectral_exit", {"width": 8, "hidden": 8, "blocks": [[[8, 2]], [[8, 1]]]})
    run = Run(tmp_path / "pines", Experiment(Data(), small, Recipe(epochs=1, batch=512)))
    run.train(progress=False)
    (choice,) = run.calibrate(RequestedBudgets(shares=(0.6,), risk=None))
    maps, figures = run.scene(share=0.6)
    assert maps.predicted.shape == maps.spent.shape == maps.truth.shape == maps.tested.shape == (145, 145)
    assert maps.colour.shape == (145, 145, 3) and maps.colour.dtype == np.uint8
    assert figures["macs_share"] == pytest.approx(maps.spent.mean()) and 0.1 < figures["macs_share"] < 1
    assert figures["seconds"] > 0 and figures["speed_up"] == figures["full_seconds"] / figures["seconds"]
    pines, model = run.data.scene, apply(run.model, choice)
    at = pines.positions("test")
    with torch.no_grad(), record(model) as trace:
        answers = torch.cat([model(x) for x, _ in run.data.test]).argmax(1)
    agree = (maps.predicted[at[:, 0], at[:, 1]] == answers.numpy()).mean()
    assert agree > 0.9  # not all: patches of the test part do not see pixels of the others
    assert len(np.unique(maps.spent.round(6))) == 3  # a pixel leaves at one of three exits
    assert trace[""]
