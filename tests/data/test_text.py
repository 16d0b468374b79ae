"""Labelled sentences: what is in the file comes out, as numbers that mean the same in every split."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynanet.core.errors import ConfigError, DataError
from dynanet.data.text import PADDING, UNKNOWN, Sentences, TruncationWarning, Vocabulary, load_labelled_lines

TEXTS = ["How far is it ?", "how FAR", "It is far", ""]


def test_lines_come_out_as_they_are(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("2 How far is it ?\n0  far \x0c away\n\n11 \n", newline="\n")
    texts, labels = load_labelled_lines(path)
    assert texts == ["How far is it ?", "far \x0c away", ""] and labels.tolist() == [2, 0, 11]
    path.write_bytes("1 caf\u00e9 \u0085 x\r\n".encode("latin-1"))
    assert load_labelled_lines(path)[0] == ["caf\u00e9 \u0085 x"]


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "has no sentences"),
        (b"\n \n", "has no sentences"),
        (b"1 good\nbad line\n", "line 2 .* begins with 'bad'"),
        (b"-1 below\n", "begins with '-1'"),
        ("\u00b2 superscript\n".encode(), "expected the number of a class"),
    ],
)
def test_what_is_no_such_file(tmp_path, content, says):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_labelled_lines(path)
    with pytest.raises(DataError, match="No such file"):
        load_labelled_lines(tmp_path / "none.txt")
    with pytest.raises(DataError, match="Is a directory"):
        load_labelled_lines(tmp_path)


def test_words_have_numbers_by_frequency():
    vocabulary = Vocabulary(TEXTS)
    assert len(vocabulary) == 2 + 5
    assert vocabulary.encode("FAR how unheard is").tolist() == [2, 3, UNKNOWN, 4]
    assert vocabulary.encode("far how is", longest=2).tolist() == [2, 3]
    assert vocabulary.encode("").tolist() == [UNKNOWN]
    assert len(Vocabulary(TEXTS, least=3)) == 2 + 1
    with pytest.raises(ConfigError, match="least must be at least 1, got 0"):
        Vocabulary(TEXTS, least=0)


@given(st.lists(st.text(alphabet="ab ", max_size=9), min_size=1, max_size=6))
def test_padding_holds_no_word(texts):
    vocabulary = Vocabulary(texts)
    data = Sentences(texts, torch.arange(len(texts)), vocabulary)
    ids, labels = Sentences.collate([data[i] for i in range(len(data))])
    assert labels.tolist() == list(range(len(texts))) and ids.shape[0] == len(texts)
    for row, text in zip(ids, texts, strict=True):
        length = max(1, len(text.split()))
        assert (row[:length] != PADDING).all() and (row[length:] == PADDING).all()
    assert int(ids.max()) < len(vocabulary)


def test_long_sentences_are_cut_and_the_limit_is_named():
    vocabulary = Vocabulary(TEXTS)
    with pytest.warns(TruncationWarning, match=r"text\(s\) \[0, 2\] have more than 2 words and were truncated"):
        data = Sentences(["how far is", "it", "far far far"], torch.zeros(3), vocabulary, longest=2)
    assert [len(ids) for ids in data.ids] == [2, 1, 2]
    assert data.collate([data[1], data[0]], width=5)[0].tolist() == [[5, 0, 0, 0, 0], [3, 2, 0, 0, 0]]


def test_a_vocabulary_comes_back_from_its_file(tmp_path):
    vocabulary = Vocabulary([*TEXTS, "\u4e2d caf\u00e9 ?"])
    vocabulary.write(tmp_path / "words.txt")
    again = Vocabulary.read(tmp_path / "words.txt")
    assert len(again) == len(vocabulary)
    for text in ("how far is it ?", "unheard caf\u00e9 \u4e2d", ""):
        assert torch.equal(again.encode(text), vocabulary.encode(text))
    for content in (b"two words\n", b"once\nonce\n", b"cut", b"\n", b"\xff\n", b"Upper\n"):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(DataError, match="bad.txt"):
            Vocabulary.read(tmp_path / "bad.txt")
    with pytest.raises(DataError, match="No such file"):
        Vocabulary.read(tmp_path / "none.txt")


def test_a_label_each():
    with pytest.raises(DataError, match="2 sentences and 3 labels"):
        Sentences(["a", "b"], torch.zeros(3), Vocabulary([]))
