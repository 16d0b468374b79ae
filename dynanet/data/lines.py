"""The reader of text files: byte order marks and line ends of all systems, the same for lists, sentences and series."""

import codecs
from pathlib import Path

from dynanet.core.errors import DataError

MARK = "\ufeff"  # a byte order mark, decoded
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_lines(path: str | Path, expected: str, *, fallback: str | None = None) -> list[str]:
    r"""The lines of a text file, without their ends: of "a\nb\n" it is a, b and an empty one.

    Lines end with \n, \r\n or \r, and with nothing else: `str.splitlines` breaks at form feeds and separators too. Byte
    order marks are dropped, also those that joined files have inside. The encoding is UTF-8, or UTF-16 behind its mark.

    Args:
        path: the file.
        expected: what the file should be, for the message.
        fallback: an encoding for other files; None: refuse them.

    Raises:
        DataError: the file cannot be read, or has another encoding.
    """
    try:
        content = Path(path).read_bytes()
        text = _decoded(content, fallback)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read {path} ({reason}); expected {expected}, in UTF-8") from error
    return [line.removeprefix(MARK) for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]


def _decoded(content: bytes, fallback: str | None) -> str:
    if content.startswith(_WIDE):
        return content.decode("utf-16")
    try:
        return content.decode()
    except UnicodeDecodeError:
        if fallback is None:
            raise
        return content.decode(fallback)
