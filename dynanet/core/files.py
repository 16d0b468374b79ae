"""Writing a file or a folder so that it is there whole or not at all, whatever happens on the way.

A power cut, a kill or a full disk leaves the old one untouched, and at worst a temporary one (`.*.tmp`) beside it. The
temporary one lies in the same folder because only a rename inside one file system is atomic.
"""

import csv
import errno
import io
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Write a file: the old content stays until the new one is complete and on the disk.

    Args:
        path: the file. If it is a symbolic link, the link is replaced, not what it points to.
        write: writes the content into the open binary file it is given: `lambda file: torch.save(state, file)`.

    Raises:
        OSError: the disk is full, the folder cannot be written, or `path` is a folder or a device. Whatever `write`
            raises is raised too; in every case
            the old file is untouched and the temporary one is gone.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_symlink() and not path.is_file():  # a rename would replace the device itself
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    fresh = _beside(path, "tmp")
    file = open(fresh, "xb")  # "x": never through a link that somebody else put there
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException as error:
        fresh.unlink(missing_ok=True)
        full = error.__context__
        if isinstance(error, RuntimeError) and isinstance(full, OSError):  # so torch.save hides a full disk
            raise OSError(full.errno, full.strerror, str(path)) from error
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(fresh)):
            raise OSError(error.errno, error.strerror, str(path)) from error  # the name that the caller knows
        raise
    _sync_folder(path.parent)


def write_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]], first: Sequence[str] = ()) -> None:
    """Write rows as a CSV file.

    Args:
        path: the file.
        rows: from columns to values; a row need not have all columns.
        first: columns that come first, also without rows; the others follow in the order in which rows name them.

    Raises:
        OSError: as `write_atomically`.
    """
    text = io.StringIO()
    columns = dict.fromkeys([*first, *(name for row in rows for name in row)])
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_folder_atomically(folder: str | os.PathLike, fill: Callable[[Path], object]) -> None:
    """Write a folder: an old one of that name, whatever is in it, is replaced when the new one is complete.

    No portable call swaps two folders, so the old one is called `.NAME.*.old` for an instant. A kill in that instant
    leaves both, complete, under their temporary names: see `set_aside`.

    Args:
        folder: the folder. Its parent must exist.
        fill: puts the content into the empty folder it is given, each file with `write_atomically`.

    Raises:
        OSError: the disk is full or the parent cannot be written. Whatever `fill` raises is raised too; in every case
            the old folder is back in its place and the temporary one is gone.
    """
    folder = Path(os.path.abspath(folder))
    fresh, aside = _beside(folder, "tmp"), _beside(folder, "old")
    fresh.mkdir()
    try:
        fill(fresh)
        _sync_folder(fresh)
        if folder.exists():
            os.rename(folder, aside)
        os.rename(fresh, folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            os.rename(aside, folder)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def set_aside(folder: str | os.PathLike) -> Path | None:
    """The complete old folder that a save, killed between its two renames, has left beside `folder`; or None."""
    folder = Path(os.path.abspath(folder))
    with suppress(OSError):
        beside = (each for each in folder.parent.iterdir() if each.name.startswith(f".{folder.name}."))
        return next((each for each in beside if each.suffix == ".old"), None)
    return None


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{suffix}")


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut. Not every system can; the rename is atomic without it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
