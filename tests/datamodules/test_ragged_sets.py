"""Labelled sequences and sentences in three parts: nothing is in two of them, and nothing is learnt from the last."""

import numpy as np
import pytest
import torch

from dynanet.core.errors import DataError
from dynanet.datamodules import SentencesDataModule, SpokenDigitsDataModule, TimeSeriesDataModule
from tests.data.test_speech import write

SERIES = "@timeStamps false\n@univariate true\n@classLabel true a b\n@data\n"


def series(path, rows, classes="a b"):
    lines = "".join(f"{','.join(map(str, values))}:{label}\n" for values, label in rows)
    path.write_text(SERIES.replace("a b", classes) + lines)


def steps(batches):
    """All frames of all sequences, (N, features)."""
    return torch.cat([frames[:length] for x, _ in batches for frames, length in zip(*x, strict=True)])


def test_digits_are_standardised_by_what_is_trained_with(tmp_path):
    draw = np.random.default_rng(0)
    for index in (0, 5, 10, 11):
        for digit in (3, 8):
            loud = 3000 if index < 5 else 300
            write(tmp_path / "recordings" / f"{digit}_a_{index}.wav", draw.normal(0, loud, 800).astype(int))
    found = SpokenDigitsDataModule(str(tmp_path), batch=2)
    assert [sum(len(y) for _, y in part) for part in (found.train, found.held_out, found.test)] == [4, 2, 2]
    frames = steps(found.train)
    torch.testing.assert_close(frames.mean(0), torch.zeros(40), rtol=0, atol=1e-4)
    torch.testing.assert_close(frames.std(0, correction=0), torch.ones(40), rtol=0, atol=1e-4)
    assert steps(found.test).mean() > 1, "louder, and left so"


def test_series_are_held_out_by_class(tmp_path):
    rows = [([n, n + 1], "ab"[n % 2]) for n in range(20)]
    series(tmp_path / "Two_TRAIN.ts", rows)
    series(tmp_path / "Two_TEST.ts", rows[:3])
    place = str(tmp_path / "Two")
    found = TimeSeriesDataModule(place, 4, batch=4)
    assert torch.cat([y for _, y in found.held_out]).bincount().tolist() == [2, 2]
    mean, std = found.inputs.mean[0], found.inputs.std[0]
    firsts = [torch.cat([x.x[:, 0, 0] for x, _ in part]) for part in (found.train, found.held_out)]
    values = [set((first * std + mean).round().int().tolist()) for first in firsts]
    assert len(values[0]) == 16 and not values[0] & values[1] and values[0] | values[1] == set(range(20))
    assert TimeSeriesDataModule(place).held_out.samples == 2
    with pytest.raises(DataError, match="cannot hold out 20 of 20"):
        TimeSeriesDataModule(place, 20).setup()
    series(tmp_path / "Two_TEST.ts", rows[:3], "b a")
    with pytest.raises(DataError, match="the classes"):
        TimeSeriesDataModule(place, 4).setup()


@pytest.mark.parametrize("ending", ["", ".all"])
def test_sentences_know_the_words_of_what_is_trained_with(tmp_path, ending):
    (tmp_path / f"set.train{ending}").write_text("0 good good film\n1 bad bad film\n" * 10)
    (tmp_path / f"set.test{ending}").write_text("0 good unheard\n")
    place = str(tmp_path / "set")
    found = SentencesDataModule(place, 4, size=8, batch=4)
    assert (sum(len(y) for _, y in found.train), found.held_out.samples, found.test.samples) == (16, 4, 1)
    (x, _) = next(iter(found.test))
    assert found.arguments["vocabulary"] == 2 + 3 and x[0].tolist()[1] == 1, "unknown"
    (tmp_path / f"set.test{ending}").write_text("2 good\n")
    with pytest.raises(DataError, match="class 2 in its test part"):
        SentencesDataModule(place, 4, size=8).setup()
    with pytest.raises(DataError, match="No such file"):
        SentencesDataModule(str(tmp_path / "none"), 4, size=8).setup()


def test_a_development_split_is_held_out(tmp_path):
    for part, rows in (("train", 4), ("dev", 3), ("test", 2)):
        (tmp_path / f"set.{part}").write_text("0 good\n1 bad\n" * rows)
    found = SentencesDataModule(str(tmp_path / "set"), batch=2)
    assert (sum(len(y) for _, y in found.train), found.held_out.samples, found.test.samples) == (8, 6, 4)
