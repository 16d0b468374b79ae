"""The commands, as users call them: what they print, what they leave behind, and how they refuse."""

import csv
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import dynanet
from dynanet.cli import COMMANDS, main
from dynanet.data.digits import load_digits
from dynanet.runs import Run

MODEL = "--model.arguments={widths: [4, 8], depths: [1, 1], context: 4}"
DIGITS = ["--data.name", "digits", "--model.name", "staged_resnet", MODEL, "--recipe.epochs", "1"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def call(capsys):
    """(arguments...) -> (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(call):
    """(arguments...) -> the one line on stderr, after exit code 2 and nothing on stdout."""

    def refused(*arguments) -> str:
        code, out, err = call(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("dynanet: ") and err.count("\n") == 1, err
        return err

    return refused


@pytest.fixture
def run(digits_run, tmp_path):
    """A calibrated run of one's own."""
    return Path(shutil.copytree(digits_run, tmp_path / "digits"))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What they do


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
    choices = told("calibrate", run, "--shares", "0.75", "--risk", "1e-9")["choices"]
    assert choices[0]["asked"] == "75 % of the MACs" and choices[0]["macs"] > 0
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
    test, inputs = load_digits("test"), dynanet.loading.read(run / "model").inputs
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
    for option in ("--data.name {indian_pines,parquet,folder,digits}", "--model.arguments", "--recipe.lr", "--resume "):
        assert option in told


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "dynanet", "nonsense"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_a_risk_that_cannot_be_promised_never_exits_early_and_says_why(call, run):
    code, out, _ = call("calibrate", run, "--shares", "0.75", "--risk", "0.0001")
    assert code == 0 and "never exits early" in out and "360 held-out samples are too few" in out
    assert (Run(run).choices()[-1].thresholds == np.inf).all()
    assert call("evaluate", run)[0] == 0


# How they refuse


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
        (["train", "new", *DIGITS, "--data.split", "foo"], "data.split says nothing about digits"),
        (["train", "new", *DIGITS, "--data.place", "/nope"], "data.place says nothing about digits"),
        (["train", "new", "--data.size", "9"], "data.size says nothing about indian_pines"),
        (["train", "new", "--recipe.lr", "-1"], "lr is -1"),
        (["train", "new", *DIGITS, "--model.name", "resnet50"], "no model 'resnet50'; the zoo has "),
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
        (["train", "no run", *DIGITS], "holds something that is no run"),
        (["demo", "--out", "no run"], "holds something that is no run"),
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
        (["calibrate", "--shares", "0.75", "1.5"], "share of 1.5 is above the dearest path"),
        (["calibrate", "--shares", "-1"], "-1"),
        (["calibrate", "--risk", "2"], "risk=2 is no probability"),
        (["calibrate", "--confidence", "1"], "confidence=1 is no probability"),
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
    for left in ("frontier", "choices.json"):
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
    assert code == 0 and "by exit" not in out
    assert "no layer that halts" in refused("calibrate", tmp_path / "static")
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
    assert "is no folder" in refused("predict", digits_run, tmp_path / "x.npy", "--out", nowhere)


def test_a_damaged_bundle(refused, run, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 8, 8)))
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert "altered" in refused("predict", run, tmp_path / "x.npy")
    assert "altered" in refused("calibrate", run)


def test_a_bundle_of_a_stranger_runs_no_code(refused, tmp_path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    torch.save(nn.Linear(3, 3), bundle / "model.safetensors")
    assert "bundle" in refused("predict", bundle, tmp_path / "x.npy")


def test_a_demo_replaces_demos_only(refused, run):
    before = contents(run)
    assert "holds a run that is no demo's" in refused("demo", "--out", run)
    assert contents(run) == before


def test_ctrl_c_leaves_a_run_that_goes_on(call, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call("train", whole, *DIGITS, "--recipe.epochs", 2)[0] == 0

    def stop(self):
        if self.current_epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dynanet.train.lightning.Training.on_train_epoch_end", stop)
        code, out, err = call("train", cut, *DIGITS, "--recipe.epochs", 2)
    assert code == 130 and out == "" and "goes on with --resume" in err and "Traceback" not in err
    assert not (cut / "model").exists()
    assert call("train", cut, "--resume")[0] == 0
    assert contents(cut / "model")[str(cut / "model" / "model.safetensors")] == (
        whole / "model" / "model.safetensors"
    ).read_bytes()


def test_a_finished_run_has_nothing_to_resume(call, run):
    code, out, err = call("train", run, "--resume")
    assert code == 0 and "had come to its end" in out and err == ""
    assert json.loads(call("train", run, "--resume", "--json")[1]) == {}


def test_a_device_is_no_place_for_answers(refused, run, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 8, 8), "float32"))
    assert "Not a regular file: /dev/null" in refused("predict", run, tmp_path / "x.npy", "--out", "/dev/null")
    assert Path("/dev/null").is_char_device()
    assert f"Is a directory: {tmp_path}" in refused("predict", run, tmp_path / "x.npy", "--out", tmp_path)


def test_a_full_disk(refused, run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(run / "choices.json"))

    before = contents(run)
    monkeypatch.setattr("os.fsync", full)
    assert "No space left on device" in refused("calibrate", run)
    assert contents(run) == before


def test_export_is_the_same_as_the_function(run, tmp_path, call):
    call("export-bundle", run, tmp_path / "bundle")
    ours = dynanet.load(tmp_path / "bundle")
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(ours(x), Run(run).model()(x))
