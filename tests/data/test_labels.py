"""Labels mean classes in bounded memory, and all parts of a set mean the same ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynanet.core.errors import DataError
from dynanet.data.labels import check_parts, count_classes
from dynanet.data.parquet import load_parquet
from dynanet.data.text import load_labelled_lines
from dynanet.datamodules.parquet import ParquetDataModule
from dynanet.datamodules.sentences import SentencesDataModule
from tests.data.make_files import noise, png, write_parquet


@given(st.lists(st.integers(0, 2**62), max_size=20))
def test_classes_are_few_or_refused(labels):
    try:
        count = count_classes(torch.tensor(labels, dtype=torch.int64))
    except DataError as error:
        assert max(labels) >= 1000 and "identifiers" in str(error)
    else:
        assert count == max(labels, default=-1) + 1 <= max(1000, 10 * len(labels))


@pytest.mark.parametrize("label", [2_000_000, 10**12, 10**17])
def test_identifiers_are_refused_by_every_reader_of_labels(tmp_path, label):
    write_parquet(tmp_path / "train.parquet", [png(image) for image in noise(4)], [label, label + 1] * 2)
    with pytest.raises(DataError, match="number the classes 0, 1, 2"):
        load_parquet(tmp_path)
    for part in ("train", "test"):
        (tmp_path / f"a.{part}").write_text(f"{label} good\n{label + 1} bad\n" * 8)
    with pytest.raises(DataError, match="number the classes 0, 1, 2"):
        _ = SentencesDataModule(place=str(tmp_path / "a")).train


def test_a_label_of_many_digits_is_no_class(tmp_path):
    (tmp_path / "a").write_text("9" * 5000 + " good\n")
    with pytest.raises(DataError, match="expected the number of a class"):
        load_labelled_lines(tmp_path / "a")


def test_parts_that_disagree_are_refused():
    check_parts("abc", {"test": ("ab", torch.tensor([0, 1]))})
    check_parts("abc", {"test": ("abcd", torch.tensor([0, 2]))})
    with pytest.raises(DataError, match="the test part has the class 3, and training has 3"):
        check_parts("abc", {"test": ("abcd", torch.tensor([0, 3]))})
    with pytest.raises(DataError, match="calls class 1 'c', and training calls it 'b'"):
        check_parts("abc", {"test": ("acb", torch.tensor([0, 1]))})


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_class_that_training_lacks_is_refused(tmp_path, part):
    for name in ("train", "validation", "test"):
        labels = [0, 1, 2, 3 if name == part else 2] * 3
        write_parquet(tmp_path / f"{name}.parquet", [png(image) for image in noise(12)], labels)
    with pytest.raises(DataError, match="part has the class 3, and training has 3 classes") as caught:
        _ = ParquetDataModule(place=str(tmp_path)).train
    assert "\n" not in str(caught.value)
