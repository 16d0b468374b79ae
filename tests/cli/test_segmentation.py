"""Segmentation on the command line: train, calibrate, evaluate, report, on a few small scenes."""

import json

import numpy as np
import pytest
import torch

from dynanet.core.budget import Budget
from dynanet.core.errors import BudgetError
from dynanet.experiment import RequestedBudgets, Run
from dynanet.experiment.config import Data, Experiment, Model, Recipe

pil = pytest.importorskip("PIL.Image")

HEIGHT, WIDTH, VOID = 21, 30, 11
TINY = "{widths: [4, 8, 8, 8], cells: [1, 1]}"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes of sky over road, some with a car; a void line at the bottom. Sides that no stride divides."""
    root, draw = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5), ("test", 4)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir()
        for k in range(count):
            labels = np.zeros((HEIGHT, WIDTH), np.uint8)
            labels[10:] = 3
            labels[12:18, 5 + k : 12 + k] = 8
            labels[-1] = VOID
            colours = np.array([[90, 140, 250], *[[0, 0, 0]] * 2, [70, 70, 70], *[[0, 0, 0]] * 4, [200, 30, 30],
                                *[[0, 0, 0]] * 3])  # fmt: skip
            pixels = np.clip(colours[labels] + draw.normal(0, 12, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
            pil.fromarray(pixels).save(root / split / f"{k}.png")
            pil.fromarray(labels).save(root / f"{split}annot" / f"{k}.png")
    return root


def options(scenes, name="layer_cascade"):
    return ["--data.name", "camvid", "--data.place", scenes, "--model.name", name, f"--model.arguments={TINY}",
            "--recipe.epochs", 3, "--recipe.batch", 4, "--recipe.lr", 0.02]  # fmt: skip


def test_train_calibrate_evaluate_report(call, scenes, tmp_path):
    folder = tmp_path / "run"
    code, out, err = call("train", folder, *options(scenes))
    assert code == 0 and "held-out accuracy" in out, err
    assert (Run(folder).model.thresholds == torch.inf).all()
    code, out, err = call("calibrate", folder, "--shares", "0.8")
    assert code == 0 and "80 % of the MACs" in out and "risk" not in out, err
    code, out, err = call("evaluate", folder)
    assert code == 0 and "miou" in out and "all at exit 3" in out and "random exits" in out, err
    results = json.loads((folder / "results.json").read_text())
    macs = [point["macs"] for point in results["points"]]
    assert macs[0] < macs[1] < macs[2] == results["full_macs"] and macs[0] < macs[3] < macs[2]
    assert all(0 <= point["miou"] <= 1 and 0 <= point["pixel_accuracy"] <= 1 for point in results["points"])
    assert set(results["points"][0]["by_class"]["iou"]) > {"sky", "road", "car"}
    code, out, err = call("report", folder)
    page = (folder / "report.html").read_text()
    assert code == 0 and "Units per position" in page and "miou" in page and page.count("<img") == 4 * 4, err


def test_a_static_network_is_scored_as_it_is(call, scenes, tmp_path):
    folder = tmp_path / "static"
    assert call("train", folder, *options(scenes, "layer_cascade_static"))[0] == 0
    code, out, err = call("evaluate", folder)
    assert code == 0 and "as trained" in out and "miou" in out, err
    assert call("report", folder)[0] == 0
    assert "no layer that halts" in call("calibrate", folder)[2]


def test_what_is_refused(refused, scenes, tmp_path):
    assert "Give --data.place" in refused("train", tmp_path / "a", "--data.name", "camvid")
    assert "is not supported for camvid" in refused("train", tmp_path / "b", *options(scenes), "--data.size", 12)
    assert "are for classification" in refused("train", tmp_path / "c", *options(scenes), "--recipe.distill", 1)


def test_no_risk_is_promised_for_positions(scenes, tmp_path):
    model = Model("layer_cascade", {"widths": [4, 8, 8, 8], "cells": [1, 1]})
    run = Run(tmp_path / "run", Experiment(Data("camvid", place=str(scenes)), model, Recipe(epochs=3, batch=4)))
    run.train(progress=False)
    choices = run.calibrate(RequestedBudgets(shares=(0.7,), risk=0.1))
    assert [choice.budget.risk for choice in choices] == [None]
    with pytest.raises(BudgetError, match="depend on each other"):
        run.frontier.choose(Budget(risk=0.1, confidence=0.9))
    assert run.frontier.table.groups.max() == 4
    assert run.explained()[1] == "70 % of the MACs"
