"""Image folders with and without splits, and what is wrong with the wrong ones."""

import pytest
import torch

from dynanet.core.errors import DataError
from dynanet.data.folder import load_folder
from tests.data.make_files import GARBAGE, noise, write_folder

CLASSES = ["ant", "bee", "cat"]


def test_a_folder_of_classes(tmp_path):
    pixels = noise(9)
    write_folder(tmp_path, pixels, [2, 1, 0] * 3, CLASSES)
    (tmp_path / "bee" / "notes.txt").write_text("no image")
    (tmp_path / ".cache").mkdir()
    data = load_folder(tmp_path, classes=3)
    assert data.classes == ("ant", "bee", "cat") and data.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    order = [2, 5, 8, 1, 4, 7, 0, 3, 6]
    assert torch.equal(data.to_memory().images, torch.from_numpy(pixels[order]).permute(0, 3, 1, 2))
    assert data.name(0).endswith("ant/002.png")


def test_labels_mean_the_same_in_every_split(tmp_path):
    write_folder(tmp_path / "train", noise(6), [0, 1, 2] * 2, CLASSES)
    write_folder(tmp_path / "validation", noise(2), [0, 2], CLASSES)  # no bee
    (tmp_path / "scripts" / "old").mkdir(parents=True)
    train, val = load_folder(tmp_path, "train"), load_folder(tmp_path, "val")
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert val.labels.tolist() == [0, 2]


def test_files_may_lie_deeper(tmp_path):
    write_folder(tmp_path / "ant", noise(2), [0, 0], ["images"])
    write_folder(tmp_path / "bee", noise(1), [0], ["images"])
    assert load_folder(tmp_path).labels.tolist() == [0, 0, 1]


def test_a_corrupt_file_and_a_dead_link_are_named(tmp_path):
    paths = write_folder(tmp_path, noise(200), [0, 1] * 100, CLASSES)
    paths[3].write_bytes(GARBAGE)
    (tmp_path / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    loaded = load_folder(tmp_path).to_memory()
    assert len(loaded) == 199
    assert sorted(loaded.corrupt) == [str(tmp_path / "ant" / "gone.png"), str(paths[3])]


def test_wrong_folders(tmp_path):
    def refused(match, *arguments, **options):
        with pytest.raises(DataError, match=match) as caught:
            load_folder(*arguments, **options)
        assert "\n" not in str(caught.value)

    refused("cannot read the folder", tmp_path / "absent")
    (tmp_path / "file").write_text("")
    refused("cannot read the folder", tmp_path / "file")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused("no images in class folders", empty)
    refused("no split 'train'; it has no subfolders", empty, "train")
    good = tmp_path / "good"
    write_folder(good / "train", noise(3), [0, 1, 2], CLASSES)
    refused("seems to hold splits.* one of train", good)
    refused("no split 'test'; it has train", good, "test")
    refused("3 classes .*expected 10", good, "train", classes=10)
    (good / "train" / "dog").mkdir()
    refused("without images: dog", good / "train")
