"""Whole or not at all: for files and folders, whatever fails on the way."""

import csv
import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from dynanet.core import files
from dynanet.core.files import set_aside, write_atomically, write_csv, write_folder_atomically


def fill_with(text):
    return lambda folder: write_atomically(folder / "f", lambda file: file.write(text))


def test_a_file_is_written_and_replaced(tmp_path):
    for content in (b"old", b"new"):
        write_atomically(tmp_path / "f", lambda file, content=content: file.write(content))
        assert (tmp_path / "f").read_bytes() == content
    assert os.listdir(tmp_path) == ["f"]


def test_a_folder_is_written_and_replaced(tmp_path):
    for content in (b"old", b"new"):
        write_folder_atomically(tmp_path / "d", fill_with(content))
        assert (tmp_path / "d" / "f").read_bytes() == content
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failed_write_leaves_the_old_one(tmp_path, error, old):
    def write(file):
        file.write(b"half")
        raise error

    if old:
        (tmp_path / "f").write_bytes(old)
        write_folder_atomically(tmp_path / "d", fill_with(old))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(type(error)):
        write_atomically(tmp_path / "f", write)
    with pytest.raises(type(error)):
        write_folder_atomically(tmp_path / "d", lambda folder: write_atomically(folder / "f", write))
    assert sorted(os.listdir(tmp_path)) == before
    if old:
        assert (tmp_path / "f").read_bytes() == (tmp_path / "d" / "f").read_bytes() == old


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "f").write_bytes(b"old")
    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "f", lambda file: file.write(b"new"))
    assert (tmp_path / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_the_old_folder_comes_back_if_the_new_cannot_take_its_place(tmp_path, monkeypatch):
    write_folder_atomically(tmp_path / "d", fill_with(b"old"))
    real, calls = os.rename, iter([False, True, False])

    def second_fails(*args):
        if next(calls):
            raise OSError(errno.EIO, "Input/output error")
        real(*args)

    monkeypatch.setattr(files.os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        write_folder_atomically(tmp_path / "d", fill_with(b"new"))
    assert (tmp_path / "d" / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["d"]


def test_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "target").write_bytes(b"theirs")
    (tmp_path / "f").symlink_to("target")
    write_atomically(tmp_path / "f", lambda file: file.write(b"ours"))
    assert (tmp_path / "target").read_bytes() == b"theirs" and not (tmp_path / "f").is_symlink()


def test_the_users_umask_holds(tmp_path):
    before = os.umask(0o027)
    try:
        write_folder_atomically(tmp_path / "d", fill_with(b""))
    finally:
        os.umask(before)
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "d" / "f").stat().st_mode & 0o777 == 0o640


@pytest.fixture
def small_disk(tmp_path):
    """One megabyte of disk, where we may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write(bytes(2_000_000)),
        lambda file: torch.save({"a": torch.zeros(500_000)}, file),  # hides the disk's error behind a RuntimeError
        lambda file: [file.write(bytes(1_000)) for _ in range(1_500)],
    ],
    ids=["at once", "torch.save", "bit by bit"],
)
def test_a_really_full_disk(small_disk, write):
    (small_disk / "f").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(small_disk / "f", write)
    assert caught.value.errno == errno.ENOSPC
    assert (small_disk / "f").read_bytes() == b"old" and os.listdir(small_disk) == ["f"]


KILLED = """
import sys
from pathlib import Path
from dynanet.core.files import write_atomically, write_folder_atomically
n = 0
while True:
    n = (n + 1) % 200
    content = bytes([n]) * 100_000
    write_atomically("f", lambda file: file.write(content))
    write_folder_atomically("d", lambda at: [write_atomically(at / x, lambda file: file.write(content)) for x in "ab"])
    print(flush=True)
"""


def test_a_kill_leaves_whole_files(tmp_path):
    """kill -9 at random moments: the file is whole, and so is the folder or, between its renames, the one set aside."""
    for k in range(8):
        process = subprocess.Popen([sys.executable, "-c", KILLED], cwd=tmp_path, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.003 * k)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        folder = tmp_path / "d" if (tmp_path / "d").exists() else set_aside(tmp_path / "d")
        for path in (tmp_path / "f", folder / "a"):
            content = path.read_bytes()
            assert len(content) == 100_000 and len(set(content)) == 1
        assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


def test_set_aside_finds_nothing_where_nothing_is(tmp_path):
    assert set_aside(tmp_path / "d") is None
    (tmp_path / ".d.old.tmp").touch()
    (tmp_path / ".e.1.old").touch()
    assert set_aside(tmp_path / "d") is None and set_aside(tmp_path / "x" / "d") is None


def test_rows_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    rows = [{"input": "a, b", "class": 'say "x"', "exit": 1}, {"input": "c", "class": "y", "exit": 2}]
    write_csv(tmp_path / "rows.csv", rows)
    with (tmp_path / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [{name: str(value) for name, value in row.items()} for row in rows]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_csv(tmp_path / "rows.csv", rows[:1])
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == read
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_columns_are_those_of_all_rows(tmp_path):
    write_csv(tmp_path / "rows.csv", [{"b": 1}, {"c": 2, "a": 3}], ("a",))
    assert (tmp_path / "rows.csv").read_text() == "a,b,c\n,1,\n3,,2\n"
    write_csv(tmp_path / "rows.csv", [], ("input",))
    assert (tmp_path / "rows.csv").read_text() == "input\n"
