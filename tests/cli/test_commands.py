"""The commands, as users call them: what they print, and what they leave behind."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import dynanet
from dynanet.cli.commands import COMMANDS
from dynanet.data.digits import load_digits
from dynanet.experiment.run import Run
from tests.cli.digits import DIGITS, contents


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_train_calibrate_evaluate_report_export_load(call, tmp_path):
    folder, half = tmp_path / "run", tmp_path / "handed on" / "half"
    code, out, err = call("train", folder, *DIGITS)
    assert code == 0 and "held-out accuracy" in out and f"next: dynanet calibrate {folder}" in out
    assert "epoch 1/1" in err and "Warning" not in err
    code, out, _ = call("calibrate", folder, "--shares", "0.9", "0.75", "--risk", 0.3)
    assert code == 0 and "90 % of the MACs: " in out and "75 % of the MACs: " in out and "risk 30 %" in out
    code, out, _ = call("evaluate", folder)
    assert code == 0 and "360 test samples" in out and "all at exit 2" in out and "random exits" in out
    code, out, _ = call("report", folder)
    assert code == 0 and (folder / "report.html").read_text().startswith("<!")
    code, out, _ = call("export-bundle", folder, half, "--share", 0.75)
    assert code == 0 and "fingerprint" in out
    model = dynanet.load(half)
    assert torch.isfinite(model.thresholds).all() and model.steps == 2
    assert (dynanet.load(folder / "model").thresholds == torch.inf).all()
    assert not [path for path in tmp_path.rglob("*.tmp")]


def test_json_is_all_that_is_printed(call, run, tmp_path):
    def told(*arguments):
        code, out, err = call(*arguments, "--json")
        assert code == 0, err
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    assert told("train", tmp_path / "new", *DIGITS)["val/accuracy"] >= 0
    choices = told("calibrate", run, "--shares", "0.75", "--risk", "1e-9")["operating_points"]
    assert choices[0]["requested"] == "75 % of the MACs" and choices[0]["macs"] > 0
    assert choices[1]["thresholds"] == ["inf"] and choices[1]["promised"] is False
    results = told("evaluate", run)
    assert len(results["accuracy_per_exit"]) == 2 and results == json.loads((run / "results.json").read_text())
    rows = told("bench", run, "--share", 0.75, "--batches", 8, "--threads", 1, "--rounds", 1)["rows"]
    assert rows[0]["batch"] == 8 and rows[0]["session_ms"] > 0
    assert told("export-bundle", run, tmp_path / "bundle")["bundle"] == str(tmp_path / "bundle")
    np.save(tmp_path / "x.npy", np.zeros((3, 1, 8, 8)))
    assert [row["input"] for row in told("predict", run, tmp_path / "x.npy")["answers"]] == ["0", "1", "2"]
    assert told("report", run)["report"] == str(run / "report.html")


def test_bench_prints_and_keeps_its_rows(call, run):
    code, out, _ = call("bench", run, "--share", "0.75", "--batches", "1,16", "--threads", "1", "--rounds", "2")
    assert code == 0 and out.count("times the untouched model") == 2 == out.count("; stream ")
    rows = table(run / "bench.csv")
    assert [row["batch"] for row in rows] == ["1", "16"]
    assert all(row["torch"] == torch.__version__ and row["load"] and row["budget"] == "75% of the MACs" for row in rows)


def test_predict_takes_arrays_images_and_folders(call, run, tmp_path):
    pil = pytest.importorskip("PIL.Image")
    test, inputs = load_digits("test"), dynanet.zoo.saved.read(run / "model").inputs
    x = (test.images[:5].float() / 255 - inputs.mean[0]) / inputs.std[0]
    np.save(tmp_path / "five.npy", x.numpy())
    np.save(tmp_path / "one.npy", x[0].numpy())
    (tmp_path / "images" / "deeper").mkdir(parents=True)
    for i, image in enumerate(test.images[:5]):
        pil.fromarray(image[0].numpy()).save(tmp_path / "images" / ("deeper" if i > 2 else "") / f"{i}.png")
    _, arrays, _ = call("predict", run, tmp_path / "five.npy", "--json")
    _, one, _ = call("predict", run, tmp_path / "one.npy", "--json")
    _, images, _ = call("predict", run, tmp_path / "images", "--json")
    _, image, _ = call("predict", run, tmp_path / "images" / "0.png", "--json")
    classes = [row["class"] for row in json.loads(arrays)["answers"]]
    assert classes == [row["class"] for row in json.loads(images)["answers"]]
    assert [json.loads(each)["answers"][0]["class"] for each in (one, image)] == classes[:1] * 2
    code, out, _ = call("predict", run, tmp_path / "images", "--out", tmp_path / "answers.csv")
    assert code == 0 and out == f"5 answers in {tmp_path / 'answers.csv'}\n"
    assert [row["class"] for row in table(tmp_path / "answers.csv")] == classes


def test_a_config_file_and_what_stands_beside_it(call, run, tmp_path):
    options = "--config", run / "config.yaml", "--recipe.epochs", 9, "--print_config"
    code, out, _ = call("train", tmp_path / "new", *options)
    shown = yaml.safe_load(out)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert code == 0 and shown["recipe"] == stored["recipe"] | {"epochs": 9}
    assert shown["data"] == stored["data"] and shown["model"] == stored["model"]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("given", [["0.5", "0.25"], ["0.5,0.25"], ["[0.5,0.25]"], ["[0.5, 0.25]"], ["5e-1", ".25"]])
def test_lists_as_one_writes_them(given, call):
    code, out, _ = call("calibrate", "--shares", *given, "run", "--risk", "null", "--print_config")
    assert code == 0 and yaml.safe_load(out) == {
        "run": "run", "shares": [0.5, 0.25], "risk": None, "confidence": 0.9, "json": False,
    }  # fmt: skip


def test_a_stopped_run_goes_on_as_it_was(call, run):
    whole = contents(run / "model")
    shutil.rmtree(run / "model")
    last = sorted(run.glob("step-*.ckpt"))[-1]
    last.unlink()
    assert call("train", run, "--resume")[0] == 0
    assert contents(run / "model") == whole and last.exists()


def test_help_tells_every_argument(call):
    code, out, _ = call("--help")
    assert code == 0
    assert call()[1] == out  # nothing asked: the same
    for command in COMMANDS:
        name = command.__name__.replace("_", "-")
        assert f"\n    {name} " in out
        code, told, _ = call(name, "--help")
        assert code == 0 and told.startswith(f"usage: dynanet {name}")
        for parameter in command.__annotations__:
            assert parameter == "return" or parameter in told
        assert "<class" not in told and "typing." not in told and "null" not in told
    told = call("train", "--help")[1]
    data = "--data.name {indian_pines,parquet,folder,digits,camvid,voc,spoken_digits,time_series,sentences}"
    for option in (data, "--model.arguments", "--recipe.lr", "--resume "):
        assert option in told


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "dynanet", "nonsense"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_a_risk_that_cannot_be_promised_never_exits_early_and_says_why(call, run):
    code, out, _ = call("calibrate", run, "--shares", "0.75", "--risk", "0.0001")
    assert code == 0 and "never exits early" in out and "360 held-out samples are too few" in out
    assert (Run(run).operating_points[-1].thresholds == np.inf).all()
    assert call("evaluate", run)[0] == 0


# How they refuse


def test_ctrl_c_leaves_a_run_that_goes_on(call, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call("train", whole, *DIGITS, "--recipe.epochs", 2)[0] == 0

    def stop(self):
        if self.current_epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dynanet.train.lightning.TrainingModule.on_train_epoch_end", stop)
        code, out, err = call("train", cut, *DIGITS, "--recipe.epochs", 2)
    assert code == 130 and out == "" and "goes on with --resume" in err and "Traceback" not in err
    assert not (cut / "model").exists()
    assert call("train", cut, "--resume")[0] == 0
    assert (
        contents(cut / "model")[str(cut / "model" / "model.safetensors")]
        == (whole / "model" / "model.safetensors").read_bytes()
    )


def test_a_finished_run_has_nothing_to_resume(call, run):
    code, out, err = call("train", run, "--resume")
    assert code == 0 and "had come to its end" in out and err == ""
    assert json.loads(call("train", run, "--resume", "--json")[1]) == {}


def test_export_is_the_same_as_the_function(run, tmp_path, call):
    call("export-bundle", run, tmp_path / "bundle")
    ours = dynanet.load(tmp_path / "bundle")
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(ours(x), Run(run).model(x))
