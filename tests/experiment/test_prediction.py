"""Answers for files are the model's own, with their exits and prices."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from dynanet import zoo
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import record
from dynanet.core.errors import BundleError, ConfigError, DataError, InputError
from dynanet.experiment.prediction import predict
from dynanet.export.bundles import bundle
from dynanet.export.config import Inputs

CLASSES = ["round", "square", "odd"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = zoo.staged_resnet(num_classes=3, widths=(4, 8), depths=(1, 1), context=4).eval()
    scores = net.confidence(net.answers(torch.randn(64, 3, 6, 5))[0], None)
    net.thresholds.fill_(scores.median().item())
    return net


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "images"
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    bundle(model, folder, classes=CLASSES, inputs=Inputs(3, (6, 5), mean, std))
    return folder


def test_rows_say_what_the_model_does(model, saved, tmp_path):
    torch.manual_seed(1)
    x = torch.randn(300, 3, 6, 5)
    np.save(tmp_path / "x.npy", x.numpy())
    rows = predict(saved, tmp_path / "x.npy")
    with torch.no_grad(), record(model) as trace:
        logits = model(x)
    assert [row["input"] for row in rows] == [str(i) for i in range(300)]
    assert [row["index"] for row in rows] == logits.argmax(1).tolist()
    assert [row["class"] for row in rows] == [CLASSES[i] for i in logits.argmax(1)]
    assert [row["probability"] for row in rows] == pytest.approx(logits.softmax(1).amax(1).tolist(), abs=1e-4)
    assert [row["exit"] for row in rows] == (1 + trace[""][0][:, 0]).int().tolist()
    assert {row["exit"] for row in rows} == {1, 2}
    assert [row["macs"] for row in rows] == CostModel(model, x[:1]).spent(trace).tolist()


@pytest.mark.parametrize("dtype", ["float16", "float64", "int64", "uint8"])
def test_arrays_of_any_numbers(dtype, saved, tmp_path):
    x = np.arange(2 * 3 * 6 * 5).reshape(2, 3, 6, 5) % 7
    np.save(tmp_path / "x.npy", x.astype("float32"))
    np.save(tmp_path / "same.npy", x.astype(dtype))
    expected = predict(saved, tmp_path / "x.npy")
    assert predict(saved, tmp_path / "same.npy") == expected
    np.save(tmp_path / "first.npy", x[0].astype(dtype))
    assert predict(saved, tmp_path / "first.npy")[0]["index"] == expected[0]["index"]


def test_no_inputs_no_answers(saved, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((0, 3, 6, 5), "float32"))
    assert predict(saved, tmp_path / "x.npy") == []


@pytest.mark.parametrize(
    "array, says",
    [
        (np.zeros((2, 3, 5, 6)), r"inputs of \(3, 5, 6\); the model takes 3 channels of \(6, 5\)"),
        (np.zeros((2, 1, 6, 5)), r"inputs of \(1, 6, 5\)"),
        (np.where(np.arange(8)[:, None, None, None] == 6, np.inf, np.zeros((8, 3, 6, 5))), r"in input\(s\) \[6\]"),
        (np.full((8, 3, 6, 5), np.nan), r"\[0, 1, 2, 3, 4\] and 3 more"),
        (np.zeros(3), "expected numbers"),
        (np.zeros((2, 3, 6, 5), complex), "complex"),
        (np.array([{}], object), "allow_pickle|pickle"),
    ],
)
def test_arrays_that_the_model_cannot_take(array, says, saved, tmp_path):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=says):
        predict(saved, tmp_path / "x.npy")


def test_an_archive_under_the_name_of_an_array(saved, tmp_path):
    with (tmp_path / "x.npy").open("wb") as file:
        np.savez(file, a=np.zeros(3))
    with pytest.raises(InputError, match="NpzFile"):
        predict(saved, tmp_path / "x.npy")


def write_image(path: Path, seed: int, size: tuple[int, int] = (6, 5)) -> torch.Tensor:
    pixels = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    pytest.importorskip("PIL.Image").fromarray(pixels.numpy()).save(path)
    return pixels.permute(2, 0, 1)


def test_images_are_scaled_as_in_training(model, saved, tmp_path):
    pixels = torch.stack([write_image(tmp_path / f"{i}.png", i) for i in range(4)])
    write_image(tmp_path / "5.PNG", 5, size=(12, 10))  # another size: resized
    rows = predict(saved, tmp_path)
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    with torch.no_grad():
        expected = model((pixels / 255 - mean) / std).argmax(1)
    assert [row["index"] for row in rows[:4]] == expected.tolist()
    assert [Path(row["input"]).name for row in rows] == ["0.png", "1.png", "2.png", "3.png", "5.PNG"]


def test_one_corrupt_image_among_many_is_left_out_and_named(saved, tmp_path, caplog):
    for i in range(101):
        write_image(tmp_path / f"{i:03}.png", i)
    (tmp_path / "050.png").write_bytes((tmp_path / "050.png").read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        rows = predict(saved, tmp_path)
    assert len(rows) == 100 and not any("050" in row["input"] for row in rows)
    assert any("050.png" in record.getMessage() for record in caplog.records)
    with pytest.raises(DataError, match="050.png"):
        predict(saved, tmp_path / "050.png")


def test_images_for_a_model_that_takes_none(tmp_path):
    write_image(tmp_path / "a.png", 0)
    net = zoo.staged_resnet(num_classes=3, in_channels=7, widths=(4,), depths=(1,), context=0)
    bundle(net, tmp_path / "bundle", inputs=Inputs(7, (6, 5)))
    with pytest.raises(InputError, match="does not say that it takes images; give an .npy file"):
        predict(tmp_path / "bundle", tmp_path / "a.png")


def test_a_bundle_that_says_nothing_of_its_input(tmp_path):
    torch.manual_seed(0)
    net = zoo.staged_resnet(num_classes=3, widths=(4,), depths=(1,), context=0)
    bundle(net, tmp_path / "bundle")
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 9, 9)))
    rows = predict(tmp_path / "bundle", tmp_path / "x.npy")
    assert [row["class"] for row in rows] == [str(row["index"]) for row in rows]
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 9, 9)))
    with pytest.raises(InputError, match="cannot take"):
        predict(tmp_path / "bundle", tmp_path / "x.npy")


def test_what_is_no_model(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 9, 9)))
    with pytest.raises(BundleError):
        predict(tmp_path / "nowhere", tmp_path / "x.npy")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="no trained model yet"):
        predict(tmp_path / "run", tmp_path / "x.npy")
