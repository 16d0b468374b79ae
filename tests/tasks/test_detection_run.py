"""Detection through the command line: a small set of images with bright squares, trained, measured and reported."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dynanet.cli.commands import main
from dynanet.core.errors import ConfigError, DataError, InputError
from dynanet.experiment import Data, Experiment, Model, Recipe, RequestedBudgets, Run, static_point, write_report
from dynanet.experiment.prediction import predict
from dynanet.tasks import Detection, TrainingOptions
from dynanet.tasks.detection.loss import DetectionLoss

pytest.importorskip("pycocotools")
TINY = {"widths": [4, 8, 8], "depths": [1, 2], "head": 8}


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    """18 images of 40 x 56 pixels with none, one or two squares; lists train (12) and test (6), no validation."""
    pil = pytest.importorskip("PIL.Image")
    place, draw = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (place / folder).mkdir(parents=True)
    for k in range(18):
        pixels, things = draw.integers(0, 60, (40, 56, 3), dtype=np.uint8), ""
        for _ in range(k % 3):
            c, (left, top) = int(draw.integers(2)), draw.integers(0, 20, 2)
            pixels[top : top + 16, left : left + 16, c] = 220
            box = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{left + 16}</xmax><ymax>{top + 16}</ymax>"
            things += f"<object><name>{'rg'[c]}</name><bndbox>{box}</bndbox></object>"
        pil.fromarray(pixels).save(place / "JPEGImages" / f"{k:02d}.png")
        (place / "Annotations" / f"{k:02d}.xml").write_text(f"<annotation>{things}</annotation>")
    for name, numbers in (("train", range(12)), ("test", range(12, 18))):
        (place / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(f"{k:02d}" for k in numbers))
    return place


@pytest.fixture(scope="module")
def run(squares, tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    experiment = Experiment(
        Data("voc", str(squares), held_out=4, size=32), Model("detector_halting", TINY),
        Recipe(epochs=1, batch=4, lr=0.02, ponder=0.05),
    )  # fmt: skip
    run = Run(tmp_path_factory.mktemp("runs") / "squares", experiment)
    metrics = run.train(progress=False)
    assert metrics["val/loss"] > 0
    yield run
    torch.set_num_threads(threads)


def test_the_data_as_it_was_asked_for(run, squares):
    data = run.data
    assert data.classes == ("g", "r") and data.inputs.size == (32, 45) and data.inputs.channels == 3
    assert (data.train.samples, data.held_out.samples, data.test.samples) == (8, 4, 6)
    assert "4 training images held out" in data.title and isinstance(data.task, Detection)
    whole = Data("voc", str(squares)).open(batch=4)
    assert whole.inputs.size == (40, 56) and whole.held_out.samples == 1
    with pytest.raises(ConfigError, match="held_out is 12"):
        Data("voc", str(squares), held_out=12).open(batch=4).setup()
    with pytest.raises(DataError, match="cannot read the folder"):
        Data("voc", str(squares / "nowhere")).open(batch=4).setup()


def test_measured_and_reported(run, capsys):
    assert main(["evaluate", str(run.folder)]) == 0
    told = capsys.readouterr().out
    assert "as trained" in told and "map_50" in told and "6 test samples" in told
    (row,) = json.loads((run.folder / "results.json").read_text())["points"]
    assert 0 < row["macs"] <= run.evaluate()["full_macs"] * 1.01
    assert set(row["by_class"]["map"]) == {"g", "r"}
    beside = static_point(run)
    assert beside.name == "squares" and beside.macs == row["macs"] and beside.accuracy == row["map"]
    path = write_report(run, static=[beside])
    text = path.read_text()
    assert text.count("<img") == 12 and "correlation with the boxes" in text and "squares" in text
    assert "<script" not in text and "image 6" in text


def test_there_is_nothing_to_calibrate(run):
    for refused in (lambda: run.calibrate(RequestedBudgets()), lambda: run.frontier):
        with pytest.raises(ConfigError, match="no thresholds to calibrate; run: dynanet evaluate"):
            refused()


def test_boxes_are_no_classes_to_predict(run, squares):
    with pytest.raises(InputError, match="maps"):
        predict(run.folder, squares / "JPEGImages")


def test_what_detection_has_no_use_for(run):
    task = run.data.task
    halting, static = run.model, Model("detector_static", TINY).build(run.data)
    assert repr(task.objective(halting, TrainingOptions(ponder=0.5))) == (
        "1 * DetectionLoss(stride=8, alpha=0.25, gamma=2.0, reach=1.5) + 0.5 * PositionPonderCost()"
    )
    assert isinstance(task.objective(static, TrainingOptions()), DetectionLoss)
    with pytest.raises(ConfigError, match="no position of this model halts"):
        task.objective(static, TrainingOptions(ponder=0.5))
    skipping = Model("detector_skip", TINY).build(run.data)
    rated = repr(task.objective(skipping, TrainingOptions(rate=0.5)))
    assert rated.endswith("+ 4 * TargetRate(rate={'3.1': 0.5, '6.1': 0.5, '6.2': 0.5})"), rated
    assert isinstance(task.objective(skipping, TrainingOptions()), DetectionLoss)
    with pytest.raises(ConfigError, match="no layer of this model is skipped"):
        task.objective(halting, TrainingOptions(rate=0.5))
    with pytest.raises(ConfigError, match="are for classification"):
        task.objective(static, TrainingOptions(distill=1.0))
    with pytest.raises(ConfigError, match="recipe.ponder is -1"):
        Recipe(ponder=-1)


def test_no_box_to_find(run):
    from dynanet.core.cost import CostModel

    model = run.model
    nothing = [(torch.zeros(2, 3, 32, 45), torch.zeros(2, 0, 5))]
    with pytest.raises(DataError, match="no box in any of 2 images"):
        run.data.task.score(model, nothing, CostModel(model, run.data.example()))
