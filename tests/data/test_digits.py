"""The digits' split: disjoint, complete, stratified, and the same on every machine."""

import hashlib

import pytest
import torch

from dynanet.core.errors import DataError
from dynanet.data.digits import SIZES, load_digits

sklearn_datasets = pytest.importorskip("sklearn.datasets")


def test_the_parts_are_the_whole_set():
    parts = [load_digits(split) for split in SIZES]
    assert [len(part) for part in parts] == [1077, 360, 360]
    bunch = sklearn_datasets.load_digits()
    pairs = zip(bunch.images, bunch.target, strict=True)
    whole = sorted((image.astype(int).tobytes(), int(label)) for image, label in pairs)
    levels = [(part.images[:, 0].double() * 16 / 255).round().long() for part in parts]
    rebuilt = [
        (image.numpy().tobytes(), int(label))
        for part, images in zip(parts, levels, strict=True)
        for image, label in zip(images, part.labels, strict=True)
    ]
    assert sorted(rebuilt) == whole


def test_every_part_has_every_class_in_proportion():
    total = torch.from_numpy(sklearn_datasets.load_digits().target).bincount()
    for split, size in SIZES.items():
        counts = load_digits(split).labels.bincount(minlength=10)
        assert (counts - total * size / 1797).abs().max() < 1.5


def test_an_item_and_the_names():
    data = load_digits("test")
    image, label = data[0]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and 0 <= image.min() and image.max() == 1.0
    assert data.classes == tuple("0123456789") and data.classes[label] == str(label)


def test_the_split_never_changes():
    images = torch.cat([load_digits(split).images for split in SIZES]).numpy().tobytes()
    assert hashlib.sha256(images).hexdigest()[:16] == "144efbee05776c4c"


def test_an_unknown_split():
    with pytest.raises(DataError, match="split must be one of train, val, test, got 'dev0'"):
        load_digits("dev0")
