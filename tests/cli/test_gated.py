"""Networks whose gates decide and that have no exits: nothing to calibrate, all the rest."""

import json

import numpy as np
import pytest

from dynanet.experiment.run import AS_TRAINED, Run

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning's, see tests/train/conftest.py
SMALL = "{size: 8, patch: 2, width: 12, depth: 2, heads: 2, drops: [0, 1], share: 0.5}"
DIGITS = ["--data.name", "digits", "--model.name", "evit", "--model.arguments", SMALL]
DIGITS += ["--recipe.epochs", "1", "--recipe.optimizer", "adamw", "--recipe.lr", "0.005"]


def test_from_training_to_the_report_without_calibration(call, refused, tmp_path):
    folder = tmp_path / "run"
    code, out, err = call("train", folder, *DIGITS)
    assert code == 0 and f"next: dynanet evaluate {folder}" in out, err
    code, out, err = call("evaluate", folder, "--json")
    results = json.loads(out)
    (point,) = results["points"]
    assert code == 0 and point["name"] == AS_TRAINED and set(point["by_class"]["accuracy"]) == set("0123456789"), err
    assert 0.3 * results["full_macs"] < point["macs"] < 0.8 * results["full_macs"], "half of the tokens go, twice"
    run = Run(folder)
    right = sum(int((run.model(x).argmax(1) == y).sum()) for x, y in run.data.test)
    assert point["accuracy"] == pytest.approx(right / 360)
    assert np.mean(list(point["by_class"]["accuracy"].values())) == pytest.approx(point["accuracy"], abs=0.02)
    code, _, err = call("report", folder)
    page = (folder / "report.html").read_text()
    assert code == 0 and "Units per position" in page and page.count("<img") == 2 * 6 and "accuracy" in page, err
    code, out, err = call("bench", folder, "--batches", "[4]", "--threads", "[1]", "--rounds", "1")
    assert code == 0 and "scheduling efficiency" in out, err
    assert "ONNX Runtime cannot run the full network" in out.splitlines()[0], "EViT ranks tokens: eager is the rival"
    for command, *more in (["calibrate"], ["export-bundle", tmp_path / "b", "--share", "0.5"]):
        assert "no layer that halts, so it has no thresholds to calibrate" in refused(command, folder, *more)
