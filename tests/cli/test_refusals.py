"""What cannot be done is said in one line, with exit code 2, and nothing is left half-written."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.cli.digits import DIGITS, contents


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["train"], "required: out; see: dynanet train --help"),
        (["calibrate", "run", "--shares", "half"], "shares: expected list"),
        (["calibrate", "run", "--confidence", "high"], "confidence: expected float; got high"),
        (["calibrate", "run", "--share", "0.5"], "--share"),
        (["train", "new", "--recipe.epoch", "3"], "--recipe.epoch"),
        (["train", "new", "--recipe.epochs", "many"], "epochs: expected int; got many; see: dynanet train --help"),
        (["train", "new", "--data.name", "mnist"], "expected one of 'indian_pines', 'parquet', 'folder', 'digits'"),
        (["train", "new", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "new", "--recipe.epochs", "0"], "epochs is 0"),
        (["train", "new", "--data.seed", "-1"], "data.seed is -1; expected 0 or more"),
        (["train", "new", *DIGITS, "--data.split", "foo"], "data.split is not supported for digits"),
        (["train", "new", *DIGITS, "--data.place", "/nope"], "data.place is not supported for digits"),
        (["train", "new", "--data.size", "9"], "data.size is not supported for indian_pines"),
        (["train", "new", "--recipe.lr", "-1"], "lr is -1"),
        (["train", "new", *DIGITS, "--model.name", "resnet50"], "model.name is 'resnet50'; expected a model"),
        (["train", "new", *DIGITS, "--model.arguments.num_classes", "3"], "num_classes = 3, but the data has 10"),
        (["train", "new", *DIGITS, "--model.arguments.colour", "red"], "'colour'; it takes widths, "),
        (["train", "new", *DIGITS, "--model.arguments.widths", "[0, 8]"], "widths"),
        (["train", "new", *DIGITS, "--recipe.batch", "100000"], "100000"),
        (["train", "new", *DIGITS, "--recipe.exit_weights", "1"], "1 weights"),
        (["train", "new", "--data.name", "folder"], "--data.place FOLDER"),
        (["train", "new", "--data.name", "folder", "--data.place", "nowhere"], "nowhere"),
        (["train", "new", "--data.name", "parquet", "--data.place", "nowhere"], "nowhere"),
        (["train", "new", "--data.split", "random"], "random"),
        (["train", "a file/new", *DIGITS], "a file"),
        (["train", "a file", *DIGITS], "a file"),
        (["train", "no run", *DIGITS], "is not empty and not a run"),
        (["demo", "--out", "no run"], "is not empty and not a run"),
        (["calibrate", "nowhere"], "a run folder has a config.yaml"),
        (["report", "no run"], "a run folder has a config.yaml"),
        (["predict", "nowhere", "x.npy"], "nowhere"),
        (["predict", "no run", "x.npy"], "no run"),
        (["export-bundle", "nowhere", "out"], "config.yaml"),
    ],
)
def test_what_makes_no_sense(arguments, says, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text("")
    Path("no run").mkdir()
    Path("no run/letter.txt").write_text("dear")
    before = contents(tmp_path)
    assert says in refused(*arguments)
    assert contents(tmp_path) == before and sorted(p.name for p in tmp_path.iterdir()) == ["a file", "no run"]


@pytest.mark.parametrize(
    "text, says",
    [
        ("recipe: {epochs: 1, momentum: 0.9}", "recipe.momentum"),
        ("recipes: {epochs: 1}", "recipes"),
        ("recipe: {epochs: [1, 2]}", "recipe.epochs: expected int"),
        ("data: {name: digits\nmodel: {", ""),
        ("just words", ""),
        ("data: !!python/object/apply:os.system ['touch hacked']", ""),
    ],
)
def test_configs_that_are_none(text, says, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    assert says in refused("train", "new", "--config", "config.yaml")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_an_empty_data_folder(refused, tmp_path):
    (tmp_path / "photos" / "train" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "test" / "cats").mkdir(parents=True)
    place = ["--data.name", "folder", "--data.place", tmp_path / "photos"]
    assert "has no images" in refused("train", tmp_path / "new", *place)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["calibrate", "--shares", "0.01"], "share of 0.01 is below the cheapest path: this model can spend 0."),
        (["calibrate", "--shares", "0.75", "1.5"], "share of 1.5 is above the most expensive path"),
        (["calibrate", "--shares", "-1"], "-1"),
        (["calibrate", "--risk", "2"], "risk must be a probability between 0 and 1, got 2"),
        (["calibrate", "--confidence", "1"], "confidence must be a probability between 0 and 1, got 1"),
        (["bench", "--share", "0.01"], "below the cheapest path"),
        (["bench", "--share", "0.75", "--batches", "5000"], "360 samples for a batch of 5000"),
        (["bench", "--share", "0.75", "--rounds", "0"], "rounds is 0; expected 1 or more"),
        (["bench", "--share", "0.75", "--threads", "0"], "threads is [0]"),
        (["bench", "--share", "0.75", "--batches", "0"], "batches is [0]"),
        (["export-bundle", "bundle", "--share", "0"], "below the cheapest path"),
        (["export-bundle", "logs"], "neither empty nor a bundle"),
        (["train", *DIGITS], "holds a run already; go on with --resume"),
        (["train", "--resume", *DIGITS], "recipe.epochs was 6 and is 1"),
        (["report", "--out", "nowhere/report.html"], "nowhere"),
    ],
)
def test_what_a_run_does_not_do(arguments, says, refused, run, monkeypatch):
    monkeypatch.chdir(run)
    before = contents(run)
    assert says in refused(arguments[0], run, *arguments[1:])
    assert contents(run) == before


def test_first_things_first(refused, run, tmp_path):
    for left in ("frontier", "operating_points.json"):
        path = run / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(run)
    for command in ("evaluate", "bench", "report"):
        assert f"was not calibrated yet; run: dynanet calibrate {run}" in refused(command, run)
    assert "not calibrated" in refused("export-bundle", run, tmp_path / "bundle", "--share", "0.75")
    assert contents(run) == before and not (tmp_path / "bundle").exists()
    shutil.rmtree(run / "model")
    for command in ("calibrate", "evaluate", "bench", "report"):
        assert f"no trained model yet; run: dynanet train {run} --resume" in refused(command, run)
    assert "no trained model yet" in refused("predict", run, tmp_path / "x.npy")


def test_a_checkpoint_of_another_model(refused, run):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("- 8", "- 16"))
    shutil.rmtree(run / "model")
    before = contents(run)
    assert "of another model" in refused("train", run, "--resume")
    now = contents(run)
    assert {name: now[name] for name in before} == before and not (run / "model").exists()


def test_a_network_of_one_exit(call, refused, tmp_path):
    """It is trained, handed on and asked; there is nothing to calibrate."""
    arguments = "--data.name digits --model.name static_resnet --recipe.epochs 1 --model.arguments".split()
    code, out, _ = call("train", tmp_path / "static", *arguments, "{widths: [4], depths: [1]}")
    assert code == 0 and "by exit" not in out and f"next: dynanet evaluate {tmp_path / 'static'}" in out
    said = refused("calibrate", tmp_path / "static")
    assert "no layer that halts, so it has no thresholds to calibrate; run: dynanet evaluate" in said
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 8, 8)))
    answers = json.loads(call("predict", tmp_path / "static", tmp_path / "x.npy", "--json")[1])["answers"]
    assert [row["exit"] for row in answers] == [1, 1] and answers[0]["macs"] > 0


@pytest.mark.parametrize(
    "array, says",
    [
        (np.full((3, 1, 8, 8), np.nan), "NaN or infinite values in input(s) [0, 1, 2]"),
        (np.zeros((3, 3, 8, 8)), "holds inputs of (3, 8, 8); the model takes 1 channels of (8, 8)"),
        (np.zeros((3, 1, 9, 8)), "(1, 9, 8)"),
        (np.zeros((8, 8)), "expected numbers (N, C, H, W) or (C, H, W)"),
        (np.array(["a", "b"]), "expected numbers"),
    ],
)
def test_inputs_that_the_model_cannot_take(array, says, refused, digits_run, tmp_path):
    np.save(tmp_path / "x.npy", array)
    assert says in refused("predict", digits_run, tmp_path / "x.npy", "--out", tmp_path / "answers.csv")
    assert not (tmp_path / "answers.csv").exists()


def test_inputs_that_are_not_there(refused, digits_run, tmp_path):
    assert "does not exist" in refused("predict", digits_run, tmp_path / "x.npy")
    (tmp_path / "empty").mkdir()
    assert "holds no inputs" in refused("predict", digits_run, tmp_path / "empty")
    (tmp_path / "x.npy").write_text("no array")
    assert "cannot be read as an .npy array" in refused("predict", digits_run, tmp_path / "x.npy")
    (tmp_path / "x.png").write_text("no image")
    assert "x.png" in refused("predict", digits_run, tmp_path / "x.png")
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 8, 8)))
    nowhere = tmp_path / "nowhere" / "answers.csv"
    assert "is not a folder" in refused("predict", digits_run, tmp_path / "x.npy", "--out", nowhere)


def test_a_damaged_bundle(refused, run, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 8, 8)))
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert "does not match manifest.json" in refused("predict", run, tmp_path / "x.npy")
    assert "does not match manifest.json" in refused("calibrate", run)


def test_a_bundle_of_a_stranger_runs_no_code(refused, tmp_path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    torch.save(nn.Linear(3, 3), bundle / "model.safetensors")
    assert "bundle" in refused("predict", bundle, tmp_path / "x.npy")


def test_a_demo_replaces_demos_only(refused, run):
    before = contents(run)
    assert "holds a run of another experiment than the demo's" in refused("demo", "--out", run)
    assert contents(run) == before


def test_a_device_is_no_place_for_answers(refused, run, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 8, 8), "float32"))
    assert "Not a regular file: /dev/null" in refused("predict", run, tmp_path / "x.npy", "--out", "/dev/null")
    assert Path("/dev/null").is_char_device()
    assert f"Is a directory: {tmp_path}" in refused("predict", run, tmp_path / "x.npy", "--out", tmp_path)


def test_a_full_disk(refused, run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(run / "operating_points.json"))

    before = contents(run)
    monkeypatch.setattr("os.fsync", full)
    assert "No space left on device" in refused("calibrate", run)
    assert contents(run) == before
