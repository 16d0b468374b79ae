"""Labelled sequences and sentences in three parts: nothing is in two of them, and nothing is learnt from the last."""

import numpy as np
import pytest
import torch

from dynanet.core.errors import DataError
from dynanet.data.parts import BucketedBatches, sentences, spoken_digits, time_series
from dynanet.data.ragged import SequenceSet
from tests.data.test_speech import write

SERIES = "@timeStamps false\n@univariate true\n@classLabel true a b\n@data\n"


def series(path, rows, classes="a b"):
    lines = "".join(f"{','.join(map(str, values))}:{label}\n" for values, label in rows)
    path.write_text(SERIES.replace("a b", classes) + lines)


def test_digits_are_standardised_by_what_is_trained_with(tmp_path):
    draw = np.random.default_rng(0)
    for index in (0, 5, 10, 11):
        for digit in (3, 8):
            loud = 3000 if index < 5 else 300
            write(tmp_path / "recordings" / f"{digit}_a_{index}.wav", draw.normal(0, loud, 800).astype(int))
    found = spoken_digits(tmp_path)
    assert [len(part) for part in (found.train, found.held_out, found.test)] == [4, 2, 2]
    frames = torch.cat(found.train.sequences)
    torch.testing.assert_close(frames.mean(0), torch.zeros(40), rtol=0, atol=1e-4)
    torch.testing.assert_close(frames.std(0, correction=0), torch.ones(40), rtol=0, atol=1e-4)
    assert torch.cat(found.test.sequences).mean() > 1, "louder, and left so"


def test_series_are_held_out_by_class(tmp_path):
    rows = [([n, n + 1], "ab"[n % 2]) for n in range(20)]
    series(tmp_path / "Two_TRAIN.ts", rows)
    series(tmp_path / "Two_TEST.ts", rows[:3])
    found = time_series(tmp_path / "Two", 4, seed=0)
    assert found.held_out.labels.bincount().tolist() == [2, 2] and len(found.train) == 16
    values = [{round(float(s[0] * found.std[0] + found.mean[0])) for s in part.sequences} for part in found[2:4]]
    assert not values[0] & values[1] and values[0] | values[1] == set(range(20))
    assert len(time_series(tmp_path / "Two", None, seed=0).held_out) == 2
    with pytest.raises(DataError, match="cannot hold out 20 of 20"):
        time_series(tmp_path / "Two", 20, seed=0)
    series(tmp_path / "Two_TEST.ts", rows[:3], "b a")
    with pytest.raises(DataError, match="the classes"):
        time_series(tmp_path / "Two", 4, seed=0)


@pytest.mark.parametrize("ending", ["", ".all"])
def test_sentences_know_the_words_of_what_is_trained_with(tmp_path, ending):
    (tmp_path / f"set.train{ending}").write_text("0 good good film\n1 bad bad film\n" * 10)
    (tmp_path / f"set.test{ending}").write_text("0 good unheard\n")
    found, vocabulary = sentences(tmp_path / "set", 4, seed=0, longest=8)
    assert (len(found.train), len(found.held_out), len(found.test)) == (16, 4, 1)
    assert len(vocabulary) == 2 + 3 and found.test.ids[0].tolist()[1] == 1, "unknown"
    (tmp_path / f"set.test{ending}").write_text("2 good\n")
    with pytest.raises(DataError, match="class 2 in its test part"):
        sentences(tmp_path / "set", 4, seed=0, longest=8)
    with pytest.raises(DataError, match="No such file"):
        sentences(tmp_path / "none", 4, seed=0, longest=8)


def test_a_development_split_is_held_out(tmp_path):
    for part, rows in (("train", 4), ("dev", 3), ("test", 2)):
        (tmp_path / f"set.{part}").write_text("0 good\n1 bad\n" * rows)
    found, _ = sentences(tmp_path / "set", None, seed=0, longest=8)
    assert (len(found.train), len(found.held_out), len(found.test)) == (8, 6, 4)


def test_batches_are_of_similar_lengths_and_every_sample_comes_once():
    data = SequenceSet([torch.randn(n % 9 + 1, 2) for n in range(50)], torch.arange(50), "classes")
    lengths = [len(s) for s in data.sequences]
    bunches = BucketedBatches(data, lengths, 4, seed=0)
    batches = [bunches.collate([bunches[i]]) for i in range(len(bunches))]
    assert sorted(int(label) for _, y in batches for label in y) == list(range(50))
    padding = sum(int((x.lengths.max() - x.lengths).sum()) for x, _ in batches)
    assert padding < 0.2 * sum(lengths)
