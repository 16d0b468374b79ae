"""One reader of text: a file means the same whatever system wrote it."""

import codecs

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynanet.core.errors import DataError
from dynanet.data.lines import read_lines
from dynanet.data.text import Vocabulary, load_labelled_lines, words
from dynanet.data.timeseries import load_time_series

ENDS = ("\n", "\r\n", "\r")
CODINGS = ("utf-8", "utf-8-sig", "utf-16")
LINE = st.text(st.characters(exclude_characters="\r\n\ufeff", exclude_categories=["Cs"]), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.lists(LINE, min_size=1, max_size=5), st.sampled_from(ENDS), st.sampled_from(CODINGS))
def test_lines_come_out_as_they_were(tmp_path, lines, end, coding):
    path = tmp_path / "a.txt"
    path.write_bytes(end.join(lines).encode(coding))
    assert read_lines(path, "text") == lines


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("coding", CODINGS)
def test_all_readers_take_all_of_them(tmp_path, end, coding):
    path = tmp_path / "a.txt"

    def write(text):
        path.write_bytes(text.replace("\n", end).encode(coding))
        return path

    texts, labels = load_labelled_lines(write("1 good film\n0\tbad film\n"))
    assert texts == ["good film", "bad film"] and labels.tolist() == [1, 0]
    assert len(Vocabulary.read(write("good\nfilm\n"))) == 4
    header = "% made up\n# by hand\n@timeStamps false\n@univariate true\n@classLabel true a b\n  % more\n@data\n"
    series = load_time_series(write(header + "% a line\n1,2:a\n\n  # another\n3,4:b\n"))
    assert torch.stack(series.sequences).flatten().tolist() == [1, 2, 3, 4] and series.labels.tolist() == [0, 1]


def test_marks_of_joined_files_are_no_part_of_a_word(tmp_path):
    part = codecs.BOM_UTF8 + b"1 good film\n"
    (tmp_path / "a.txt").write_bytes(part + part)
    assert load_labelled_lines(tmp_path / "a.txt")[0] == ["good film"] * 2
    assert words("\ufeffGood film") == ["good", "film"]


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9\n")
    assert read_lines(path, "text", fallback="latin-1") == ["café", ""]
    with pytest.raises(DataError, match="expected a list of names, in UTF-8"):
        read_lines(path, "a list of names")
    path.write_bytes(codecs.BOM_UTF16_LE + b"a")
    with pytest.raises(DataError, match="expected text"):
        read_lines(path, "text", fallback="latin-1")
    with pytest.raises(DataError, match="No such file"):
        read_lines(tmp_path / "b.txt", "text")
