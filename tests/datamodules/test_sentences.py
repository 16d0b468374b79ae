import pytest
import torch

from dynanet.core.errors import DataError
from dynanet.data.text import TruncationWarning
from dynanet.datamodules import SentencesDataModule


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


def test_a_number_to_hold_out_goes_before_the_development_split(tmp_path):
    for part, rows in (("train", 10), ("dev", 3), ("test", 2)):
        (tmp_path / f"set.{part}").write_text("0 good\n1 bad\n" * rows)
    place = str(tmp_path / "set")
    own, drawn = SentencesDataModule(place), SentencesDataModule(place, 4, seed=1)
    assert own.title == "set, its own development split" and own.held_out.samples == 6
    assert drawn.title == "set, 4 training sentences held out, seed 1" and drawn.held_out.samples == 4


def test_sentences_are_padded_to_the_size_and_cut_with_a_warning(tmp_path):
    for part in ("train", "dev", "test"):
        (tmp_path / f"set.{part}").write_text("0 good\n1 bad bad bad bad\n" * 4)
    place = str(tmp_path / "set")
    (x, _) = next(iter(SentencesDataModule(place, size=8).test))
    assert x.shape == (8, 8) and SentencesDataModule(place).example(2).shape == (2, 64)
    with pytest.warns(TruncationWarning, match="more than 3 words"):
        (cut, y) = next(iter(SentencesDataModule(place, size=3).test))
    assert cut.shape == (8, 3) and torch.equal(cut[y == 1], x[y == 1][:, :3])
