import pytest
import torch

from dynanet.datamodules import DataModule
from dynanet.experiment import Data, Experiment, Model, Recipe, Run


def test_it_is_read_once_and_only_when_it_is_used(stripes, monkeypatch, tmp_path):
    count = []
    whole = stripes.setup
    monkeypatch.setattr(stripes, "setup", lambda self: count.append(self) or whole(self))
    run = Run(tmp_path, Experiment(Data("stripes"), Model("staged_resnet"), Recipe(batch=8)))
    data = run.data
    assert not count
    assert data.classes == ("row", "column") and data.arguments == {"num_classes": 2, "in_channels": 1}
    assert data.train.samples == 32 and data.example(3).shape == (3, 1, 6, 6) == data.test_samples(3).shape
    assert data.inputs.pictures(data.example(2)).shape == (2, 6, 6) and data.scene is None
    assert len(count) == 1


def test_every_property_is_that_of_what_was_opened(stripes):
    data = stripes(batch=4)
    opened = data.opened
    for name in ("title", "classes", "inputs", "train", "held_out", "test", "task", "scene"):
        assert getattr(data, name) is getattr(opened, name), name
    assert [len(y) for _, y in data.train] == [4] * 8


def test_the_first_test_inputs_are_one_batch(stripes):
    data = stripes(batch=8)
    whole = torch.cat([x for x, _ in data.test])
    assert torch.equal(data.test_samples(5), whole[:5]) and torch.equal(data.test_samples(99), whole)
    assert torch.equal(data.cut(whole), whole), "images have no padding"


def test_a_module_without_a_setup_is_none():
    with pytest.raises(TypeError, match="abstract method '?setup"):
        type("Unread", (DataModule,), {})()
