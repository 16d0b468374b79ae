"""A new data module is one class and one line of the table."""

import json
from dataclasses import dataclass

import pytest
import torch

from dynanet.cli.commands import main
from dynanet.core.errors import ConfigError
from dynanet.data.images import ImageTensors
from dynanet.datamodules import DATA_MODULES, DataModule
from dynanet.datamodules.images import labelled_images
from dynanet.experiment import Data, Experiment, Model, Recipe, Run


@dataclass(eq=False)
class Stripes(DataModule):
    """Images with a bright row or a bright column."""

    hold_out: int | None = None
    size: int | None = None

    def setup(self):
        side = self.size or 6
        labels = torch.arange(48) % 2
        images = torch.zeros(48, 1, side, side, dtype=torch.uint8)
        images[labels == 0, :, 2] = 200
        images[labels == 1, :, :, 2] = 200
        train, held_out, test = (
            ImageTensors(images[rows], labels[rows], ("row", "column"))
            for rows in (slice(0, 32), slice(32, 40), slice(40, 48))
        )
        return labelled_images(
            f"stripes, {self.hold_out} held out", train, held_out, test,
            batch=self.batch, seed=self.shuffle_seed, crop=0, flip=0,
        )  # fmt: skip


@pytest.fixture
def stripes(monkeypatch):
    monkeypatch.setitem(DATA_MODULES, "stripes", Stripes)


def test_it_is_opened_by_name_on_the_command_line(stripes, tmp_path, capsys):
    small = "{widths: [4, 8], depths: [1, 1], context: 4}"
    given = ["--data.name", "stripes", "--data.size", "8", "--data.held_out", "5", "--model.name", "staged_resnet"]
    given += ["--model.arguments", small, "--recipe.epochs", "3", "--recipe.batch", "8"]
    assert main(["train", str(tmp_path / "run"), *given]) == 0
    assert main(["calibrate", str(tmp_path / "run"), "--shares", "0.9", "--risk", "null"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["data"] == "stripes, 5 held out" and results["test_samples"] == 8
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "sentences,stripes}" in capsys.readouterr().out


def test_options_that_it_does_not_have_are_refused_by_name(stripes):
    with pytest.raises(ConfigError, match="data.place is not supported for stripes; leave it out"):
        Data("stripes", place="somewhere")
    with pytest.raises(ConfigError, match="data.split is not supported for stripes"):
        Data("stripes", split="whole_fields")
    with pytest.raises(ConfigError, match="data.name is 'dots'; expected one of 'indian_pines', .*'stripes'"):
        Data("dots")


def test_it_is_read_once_and_only_when_it_is_used(stripes, monkeypatch, tmp_path):
    count = []
    whole = Stripes.setup
    monkeypatch.setattr(Stripes, "setup", lambda self: count.append(self) or whole(self))
    run = Run(tmp_path, Experiment(Data("stripes"), Model("staged_resnet"), Recipe(batch=8)))
    data = run.data
    assert not count
    assert data.classes == ("row", "column") and data.arguments == {"num_classes": 2, "in_channels": 1}
    assert data.train.samples == 32 and data.example(3).shape == (3, 1, 6, 6) == data.test_samples(3).shape
    assert data.inputs.pictures(data.example(2)).shape == (2, 6, 6) and data.scene is None
    assert len(count) == 1


@pytest.mark.parametrize("name", DATA_MODULES)
def test_every_module_is_named_after_its_set(name):
    kind = DATA_MODULES[name]
    assert kind.__module__ == f"dynanet.datamodules.{name}" and kind.__doc__
    assert kind.__name__.lower() == f"{name.replace('_', '')}datamodule"
