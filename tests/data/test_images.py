"""Corrupt images are named and survived up to 1 %; parts do not leak, with corrupt images too."""

import io
import logging
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from dynanet.core.errors import ConfigError, DataError
from dynanet.data.images import Images, ImageTensors, name_classes, to_float
from dynanet.data.splits import hold_out, stratified, synonyms
from tests.data.make_files import GARBAGE, noise, png


class Listed:
    """Encoded images in a list."""

    def __init__(self, files) -> None:
        self.files = files

    def read(self, row):
        if self.files[row] is None:
            raise OSError("the row has no bytes")
        return self.files[row]

    def name(self, row):
        return f"image {row}"


def dataset(count=100, broken=(), classes=4, **arguments):
    pixels = noise(count)
    files = [GARBAGE if row in broken else png(image) for row, image in enumerate(pixels)]
    labels = torch.arange(count) % classes
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Images(Listed(files), labels, [str(k) for k in range(classes)], **arguments), expected


def raw(image):
    return image


def test_an_image_is_what_was_written():
    data, expected = dataset()
    image, label = data[7]
    assert image.dtype == torch.float32 and type(label) is int and label == 3
    torch.testing.assert_close(image, expected[7] / 255)
    assert torch.equal(data[-1][0], data[99][0])
    with pytest.raises(IndexError):
        data[100]


def test_in_memory_is_the_same_dataset():
    data, expected = dataset(transform=raw)
    loaded = data.to_memory()
    assert torch.equal(loaded.images, expected) and torch.equal(loaded.labels, data.labels)
    assert loaded.classes == data.classes and loaded.images.is_contiguous()
    for index in (0, 5, -1):
        assert torch.equal(loaded[index][0], data[index][0]) and loaded[index][1] == data[index][1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_takes_it(workers):
    data, expected = dataset(16)
    for kind in (data, data.to_memory()):
        images, labels = zip(*DataLoader(kind, 4, num_workers=workers), strict=True)
        torch.testing.assert_close(torch.cat(images), expected / 255)
        assert torch.equal(torch.cat(labels), torch.arange(16) % 4)


def test_a_corrupt_image_is_named_once_and_the_next_good_one_answers(caplog):
    data, expected = dataset(200, broken=(9, 10), transform=raw)
    with caplog.at_level(logging.WARNING, "dynanet.data"):
        answers = [data[9], data[9], data[10], data[11]]
    for image, label in answers:
        assert torch.equal(image, expected[11]) and label == 11 % 4
    assert list(data.corrupt) == ["image 9", "image 10"]
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "corrupt image: image 9",
        "corrupt image: image 10",
    ]


def test_the_last_image_is_replaced_by_the_first():
    data, expected = dataset(100, broken=(99,), transform=raw)
    assert torch.equal(data[99][0], expected[0])


def test_memory_leaves_corrupt_images_out():
    data, expected = dataset(200, broken=(0, 150), transform=raw)
    loaded = data.to_memory()
    good = [row for row in range(200) if row not in (0, 150)]
    assert torch.equal(loaded.images, expected[good]) and torch.equal(loaded.labels, data.labels[good])
    assert list(loaded.corrupt) == ["image 0", "image 150"]


@pytest.mark.parametrize(("broken", "ends"), [(2, False), (3, True)])
def test_more_than_one_percent_ends_it_with_the_list(broken, ends):
    rows = [30 * k for k in range(broken)]
    for read in (Images.to_memory, lambda data: [data[row] for row in range(200)]):
        data, _ = dataset(200, broken=rows)
        if not ends:
            read(data)
            assert len(data.corrupt) == broken
            continue
        with pytest.raises(DataError) as caught:
            read(data)
        message = str(caught.value)
        assert "\n" not in message and "3 of 200" in message and all(f"image {row} (" in message for row in rows)
        with pytest.raises(DataError):  # also for whoever carries on
            data[rows[0]]


def test_rows_without_bytes_and_truncated_files_are_corrupt():
    data, _ = dataset(300)
    data._source.files[4] = None
    data._source.files[5] = data._source.files[5][:60]
    data._source.files[6] = b""
    data.to_memory()
    assert list(data.corrupt) == ["image 4", "image 5", "image 6"]
    assert "no bytes" in data.corrupt["image 4"]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), broken=st.sets(st.integers(0, 199), max_size=1))
def test_held_out_parts_share_no_image_even_when_some_are_corrupt(seed, broken):
    data, _ = dataset(200, broken=broken, transform=raw)
    rest, held = hold_out(data, 100, seed=seed, transform=raw)
    seen = [{image.numpy().tobytes() for image, _ in (part[k] for k in range(len(part)))} for part in (rest, held)]
    assert not seen[0] & seen[1]
    assert len(seen[0]) + len(seen[1]) == 200 - len(broken)


def test_held_out_is_stratified_and_repeatable():
    data, _ = dataset(200)
    data = data.to_memory()
    rest, held = hold_out(data, 40, seed=3)
    assert held.labels.bincount().tolist() == [10] * 4 and rest.labels.bincount().tolist() == [40] * 4
    again, other = hold_out(data, 40, seed=3)[1], hold_out(data, 40, seed=4)[1]
    assert torch.equal(held.images, again.images) and not torch.equal(held.images, other.images)


def test_held_out_does_not_inherit_an_augmentation():
    data, _ = dataset(20, transform=lambda image: image + torch.rand(()))
    with pytest.raises(ConfigError, match="augmented"):
        hold_out(data, 10, seed=0)
    rest, held = hold_out(data, 10, seed=0, transform=to_float)
    assert held.transform is to_float and rest.transform is data.transform
    for count in (0, 20):
        with pytest.raises(ConfigError, match="hold out"):
            hold_out(data, count, seed=0, transform=to_float)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=3, max_size=120),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**32 - 1),
)
def test_stratified_parts_cover_the_rows_and_keep_proportions(labels, cuts, seed):
    labels = torch.tensor(labels)
    first, second = sorted(round(cut * len(labels)) for cut in cuts)
    sizes = [first, second - first, len(labels) - second]
    parts = stratified(labels, sizes, seed)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(labels)))
    for part, bound in zip(parts, (1, 2, 2), strict=True):
        for value in labels.unique():
            fair = len(part) * int((labels == value).sum()) / len(labels)
            assert abs(int((labels[part] == value).sum()) - fair) < bound


def test_sizes_modes_and_orientation():
    grey = Images(Listed([png(noise(1, 8, 8, 1)[0])]), torch.tensor([0]), ["a"], mode="RGB", transform=raw)
    assert grey[0][0].shape == (3, 8, 8) and torch.equal(grey[0][0][0], grey[0][0][2])
    data, _ = dataset(4, mode="L", size=(3, 3), transform=raw)
    assert data.to_memory().images.shape == (4, 1, 3, 3)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(np.zeros((4, 9, 3), np.uint8)).save(file, "JPEG", exif=exif)
    assert Images(Listed([file.getvalue()]), torch.tensor([0]), ["a"])[0][0].shape == (3, 9, 4)
    file = io.BytesIO()
    Image.fromarray(noise(1)[0]).quantize(8).save(file, "PNG", transparency=b"\x00\x80")
    assert Images(Listed([file.getvalue()]), torch.tensor([0]), ["a"])[0][0].shape == (3, 6, 5)  # and no warning
    with pytest.raises(ConfigError, match="CMYK"):
        dataset(4, mode="CMYK")


def test_sixteen_bits_are_refused_rather_than_clipped():
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(file, "PNG")
    with pytest.raises(DataError, match="more than 8 bits"):
        Images(Listed([file.getvalue()]), torch.tensor([0]), ["a"])[0]


def test_images_of_two_sizes_need_a_size():
    files = [png(noise(1, 6, 5)[0]), png(noise(1, 7, 5)[0])]
    data = Images(Listed(files), torch.tensor([0, 0]), ["a"])
    with pytest.raises(DataError, match="image 1 is 7 x 5 and image 0 is 6 x 5"):
        data.to_memory()
    assert len(Images(Listed(files), torch.tensor([0, 0]), ["a"], size=(4, 4)).to_memory()) == 2


def test_nothing_and_misfits_are_refused():
    with pytest.raises(DataError, match="no images"):
        Images(Listed([]), torch.zeros(0, dtype=torch.long), [])
    with pytest.raises(DataError, match="expected uint8"):
        ImageTensors(torch.zeros(2, 3, 4, 4), torch.zeros(2), ["a"])
    with pytest.raises(DataError, match="expected uint8"):
        ImageTensors(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3), ["a"])


def test_class_names_must_agree():
    labels = torch.tensor([0, 2])
    assert name_classes(labels, None, None) == ("0", "1", "2")
    assert name_classes(labels, None, 5) == ("0", "1", "2", "3", "4")
    assert name_classes(labels, None, ["a", "b", "c"]) == ("a", "b", "c")
    assert name_classes(labels, ["a", "b", "c"], 3) == ("a", "b", "c")
    for names, wanted in [(["a", "b", "c"], 4), (["a", "b"], None), (None, 2), (["a", "b", "c"], ["a", "c", "b"])]:
        with pytest.raises(DataError, match="expected"):
            name_classes(labels, names, wanted)
    with pytest.raises(DataError, match="1 of 2 rows have a negative label"):
        name_classes(torch.tensor([0, -1]), None, None)


def test_both_kinds_survive_pickling():
    data, _ = dataset(8)
    for kind in (data, data.to_memory()):
        assert torch.equal(pickle.loads(pickle.dumps(kind))[3][0], data[3][0])


def test_synonyms_of_splits():
    assert synonyms("val") == ("val", "validation", "valid", "dev")
    assert synonyms("fold1") == ("fold1",)
