"""An experiment is a plain configuration that opens its data and builds its model."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from dynanet.core.errors import ConfigError, DataError
from dynanet.experiment import Data, Experiment, Model, Recipe
from dynanet.mechanisms.early_exit import EarlyExit

TINY = {"widths": [4, 8], "depths": [1, 1]}


@pytest.fixture(scope="module")
def digits():
    return Data("digits").open(batch=64, seed=3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """20 images to train with, 4 to validate, 6 to test; two classes, of 12 x 10 pixels."""
    pil = pytest.importorskip("PIL.Image")
    place, generator = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    for split, count in (("train", 10), ("val", 2), ("test", 3)):
        for shade, name in ((60, "cats"), (160, "dogs")):
            (place / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(shade, shade + 60, (12, 10, 3), dtype=torch.uint8, generator=generator)
                pil.fromarray(pixels.numpy()).save(place / split / name / f"{i}.png")
    return place


def test_it_comes_back_from_its_file(tmp_path):
    experiment = Experiment(Data("folder", "place", held_out=7), Model("msdnet", TINY), Recipe(exit_weights=[1.0, 2.0]))
    experiment.save(tmp_path / "config.yaml")
    assert Experiment.read(tmp_path / "config.yaml") == experiment
    assert experiment.changes(experiment) == []
    tuples = replace(experiment, model=Model("msdnet", {"widths": (4, 8), "depths": (1, 1)}))
    assert experiment.changes(tuples) == []  # what a file cannot tell apart is no change
    other = replace(experiment, recipe=Recipe(epochs=3, exit_weights=[1.0, 2.0]))
    assert experiment.changes(other) == ["recipe.epochs was 18 and is 3"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "words",
        "- 1\n- 2",
        "data: {}\nmodel: {}",
        "data: {}\nmodel: {}\nrecipe: {momentum: 0.9}",
        "data: []\nmodel: 3\nrecipe: {}",
        "data: {\nmodel: {}",
        "data: {}\nmodel: {}\nrecipe: {epochs: many}",
        "data: !!python/name:os.system {}\nmodel: {}\nrecipe: {}",
        b"\xff\xfe\x00",
    ],
)
def test_files_that_are_no_experiment(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match="is not the configuration of a run") as caught:
        Experiment.read(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read .*; a run folder has a config.yaml"):
        Experiment.read(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"batch": 0}, {"lr": 0}, {"lr": float("nan")}, {"weight_decay": -1}, {"warmup": 1.5},
        {"distill": -1}, {"label_smoothing": 1.0},
    ],
)  # fmt: skip
def test_recipes_that_make_no_sense(wrong):
    with pytest.raises(ConfigError, match=f"recipe.{next(iter(wrong))} is .*; expected"):
        Recipe(**wrong)
    assert asdict(Recipe(warmup=0.0, weight_decay=0.0))


def test_digits(digits):
    assert (digits.inputs.channels, digits.inputs.size, len(digits.classes)) == (1, (8, 8), 10)
    parts = [torch.cat([x for x, _ in batches]) for batches in (digits.held_out, digits.test)]
    assert [len(part) for part in parts] == [360, 360]
    x = torch.cat([x for x, _ in digits.train])
    assert len(x) == 1077 // 64 * 64
    assert x.mean().abs() < 0.05 and (x.std() - 1).abs() < 0.05  # standardised by mean and std
    assert digits.example(3).shape == (3, 1, 8, 8) and torch.equal(digits.example(), digits.example())


def test_the_held_out_part_is_never_augmented(photos):
    data = Data("folder", str(photos)).open(batch=4)
    for batches in (data.held_out, data.test):
        first, again = (torch.cat([x for x, _ in batches]) for _ in range(2))
        assert torch.equal(first, again)
    first, again = (torch.cat([x for x, _ in data.train]) for _ in range(2))
    assert not torch.equal(first, again)


def test_what_is_held_out_of_a_folder(photos, tmp_path):
    data = Data("folder", str(photos)).open(batch=4)
    assert (data.held_out.samples, data.train.samples, data.test.samples) == (4, 20, 6)
    assert data.title.endswith("with its validation split") and data.classes == ("cats", "dogs")
    asked = Data("folder", str(photos), held_out=6).open(batch=4)
    assert (asked.held_out.samples, asked.train.samples) == (6, 14) and "6 training images held out" in asked.title
    for split in ("train", "test"):
        (tmp_path / split).symlink_to(photos / split)
    tenth = Data("folder", str(tmp_path)).open(batch=4)
    assert (tenth.held_out.samples, tenth.train.samples) == (2, 18)
    small = Data("folder", str(tmp_path), size=8).open(batch=4)
    assert small.inputs.size == (8, 8)


@pytest.mark.parametrize(
    "data, batch, error, says",
    [
        (Data("folder"), 4, ConfigError, "data.place is missing"),
        (Data("parquet"), 4, ConfigError, "data.place is missing"),
        (Data("parquet", "nowhere"), 4, DataError, "nowhere"),
        (Data("digits"), 2000, ConfigError, "batches of 2000 from 1077"),
        (Data(split="random"), 4, ConfigError, "random"),
    ],
)
def test_data_that_cannot_be_opened(data, batch, error, says):
    with pytest.raises(error, match=says):
        data.open(batch).setup()


def test_more_held_out_than_there_is(photos):
    with pytest.raises(ConfigError, match="cannot hold out 5000 of 20 images"):
        Data("folder", str(photos), held_out=5000).open(batch=4).setup()


def test_models_get_classes_and_channels_from_the_data(digits):
    model = Model("staged_resnet", TINY).build(digits)
    assert isinstance(model, EarlyExit) and model(digits.example(2)).shape == (2, 10)
    assert Model("staged_resnet", {**TINY, "num_classes": 10}).build(digits).steps == 2
    for arguments, says in [
        ({"num_classes": 3}, "num_classes = 3, but the data has 10"),
        ({"in_channels": 3}, "in_channels = 3, but the data has 1"),
        ({"colour": "red"}, "staged_resnet does not take .colour"),
        ({"widths": "wide"}, "widths"),
        ({"widths": 3}, "staged_resnet"),
    ]:
        with pytest.raises(ConfigError, match=says):
            Model("staged_resnet", arguments).build(digits)
    with pytest.raises(ConfigError, match="model.name is 'resnet50'; expected a model of the zoo: .*msdnet, "):
        Model("resnet50").build(digits)
