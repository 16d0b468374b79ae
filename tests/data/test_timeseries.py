"""Time series and ragged batches: what is in the file comes out, and what is damaged is named."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynanet.core.errors import DataError
from dynanet.data.ragged import SequenceSet, check_sequence, pad
from dynanet.data.timeseries import load_time_series

SHARED = Path(os.environ.get("DYNANET_DATA", Path(__file__).parents[3] / "shared" / "data")) / "timeseries"
HEADER = "#made up\n@problemName Two\n@timeStamps false\n@univariate false\n@dimensions 2\n@equalLength false\n"
CLASSES = "@classLabel true yes No\n@data\n"


def file(tmp_path, text):
    path = tmp_path / "a.ts"
    path.write_text(text)
    return path


def test_series_come_out_as_they_are(tmp_path):
    data = load_time_series(file(tmp_path, HEADER + CLASSES + "1,2.5,-3e-1:4,5,6:No\n\n7:8:yes\n"))
    assert data.sequences[0].T.tolist() == [[1, 2.5, pytest.approx(-0.3)], [4, 5, 6]]
    assert data.sequences[1].tolist() == [[7, 8]]
    assert data.labels.tolist() == [1, 0] and data.classes == ["yes", "No"]
    assert (data.features, data.longest, len(data)) == (2, 3, 2)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no line @data"),
        (HEADER, "no line @data"),
        ("1,2:3,4:yes\n", "line 1 .* begins with '1,2:3,4:yes'"),
        (HEADER + "@data\n1:2:yes\n", "regression"),
        (HEADER + "@classLabel false\n@data\n1:2:yes\n", "regression"),
        (HEADER + CLASSES, "no series behind @data"),
        (HEADER + CLASSES + "1,2:3,4:maybe\n", "line 9 .* ends in 'maybe'"),
        (HEADER + CLASSES + "yes\n", "line 9"),
        (HEADER + CLASSES + "1,2:3:yes\n", r"dimensions of \[2, 1\] steps"),
        (HEADER + CLASSES + "1,?:3,4:yes\n", "missing values"),
        (HEADER + CLASSES + "1,NaN:3,4:yes\n", "NaN"),
        (HEADER + CLASSES + "1,2:yes\n", "announces @dimensions 2"),
        (HEADER.replace("Length false", "Length true") + CLASSES + "1:2:yes\n1,2:3,4:No\n", "of one length"),
        (HEADER + "@seriesLength 3\n" + CLASSES + "1,2:3,4:yes\n", "announces @seriesLength 3"),
        (HEADER.replace("Stamps false", "Stamps true") + CLASSES + "(0,1):(0,2):yes\n", "time stamps"),
    ],
)
def test_what_is_no_such_file(tmp_path, text, says):
    with pytest.raises(DataError, match=says):
        load_time_series(file(tmp_path, text))
    with pytest.raises(DataError, match="No such file"):
        load_time_series(tmp_path / "none.ts")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs sets of the UEA and UCR archives")
def test_the_real_sets():
    vowels = [load_time_series(SHARED / f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST")]
    assert [len(part) for part in vowels] == [270, 370] and vowels[0].classes == vowels[1].classes
    lengths = {len(s) for part in vowels for s in part.sequences}
    assert (min(lengths), max(lengths), vowels[0].features) == (7, 29, 12)
    motions = load_time_series(SHARED / "BasicMotions_TRAIN.ts")
    assert (len(motions), motions.features, motions.longest) == (40, 6, 100)
    with pytest.raises(DataError, match="regression"):
        load_time_series(SHARED / "Tecator_TRAIN.ts")


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_padding_is_taken_off_again(lengths):
    sequences = [torch.randn(n, 2) for n in lengths]
    data = SequenceSet(sequences, torch.arange(len(lengths)), ["any"])
    (x, sizes), labels = SequenceSet.collate([data[i] for i in range(len(data))])
    assert sizes.tolist() == lengths and labels.tolist() == list(range(len(lengths)))
    for row, size, sequence in zip(x, lengths, sequences, strict=True):
        assert torch.equal(row[:size], sequence) and not row[size:].any()


def test_features_are_standardized_over_all_steps():
    data = SequenceSet([torch.randn(5, 2) * 3 + 1, torch.randn(9, 2)], torch.tensor([0, 1]), ["a", "b"])
    steps = torch.cat(data.standardized(*data.statistics()).sequences)
    torch.testing.assert_close(steps.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(steps.std(0, correction=0), torch.ones(2))
    flat = SequenceSet([torch.ones(3, 1)], torch.tensor([0]), ["a"])
    assert flat.standardized(*flat.statistics()).sequences[0].tolist() == [[0]] * 3


def test_what_is_no_sequence():
    with pytest.raises(DataError, match="at least one"):
        pad([])
    with pytest.raises(DataError, match=r"sequence 1 has the shape \(0, 2\)"):
        pad([torch.zeros(3, 2), torch.zeros(0, 2)])
    with pytest.raises(DataError, match="first at step 2"):
        check_sequence(torch.tensor([[0.0], [1], [torch.inf]]), "this")
    with pytest.raises(DataError, match="1 sequences and 2 labels"):
        SequenceSet([torch.zeros(3, 2)], torch.tensor([0, 1]), ["a"])
    with pytest.raises(DataError, match=r"\[1, 2\] features"):
        SequenceSet([torch.zeros(3, 2), torch.zeros(3, 1)], torch.tensor([0, 0]), ["a"])
