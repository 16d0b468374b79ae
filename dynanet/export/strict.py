"""Strict parsing of untrusted JSON, limits on its values, and one-line quotes of it for messages."""

import json
import math
import reprlib
from typing import Any

from dynanet.core.errors import BundleError

MOST_INTEGER = 1_000_000
MOST_ITEMS = 10_000
MOST_CHARACTERS = 1_000

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def dump(value: Any) -> bytes:
    """Canonical JSON with one line per key: equal values give equal bytes."""
    return _dump(value, "\n").encode()


def parse(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object in UTF-8, without duplicate keys, NaN or too deep nesting.

    Raises:
        BundleError: it is not one; `where` names the file.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is damaged: {line(error)}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{where} holds {short(value)}; expected a JSON object")
    return value


def check_keys(value: Any, expected: set[str], where: str) -> None:
    """Check for exactly these keys: an unknown one could change the meaning of the others.

    Raises:
        BundleError: other keys, or not an object.
    """
    if not isinstance(value, dict) or set(value) != expected:
        found = sorted(value) if isinstance(value, dict) else value
        raise BundleError(f"{where} has {short(found)}; expected exactly {', '.join(sorted(expected))}")


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """Check a value against the limits of this module, and convert its tuples to lists.

    Raises:
        BundleError: a number, string or list beyond the limits, or another type.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) <= MOST_INTEGER:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str) and len(value) <= MOST_CHARACTERS and value.isprintable():
        return value
    if isinstance(value, list | tuple) and len(value) <= MOST_ITEMS and depth < 4:
        return [plain(item, where, depth + 1) for item in value]
    raise BundleError(
        f"{where} is {short(value)}; expected whole numbers up to {MOST_INTEGER:,}, finite numbers, printable strings "
        f"of at most {MOST_CHARACTERS:,} characters, or lists of at most {MOST_ITEMS:,} of these"
    )


def short(value: Any) -> str:
    """A value as one short line for a message."""
    return _cut(_REPR.repr(value))


def line(error: Exception) -> str:
    """An error as one line for a message."""
    return _cut(str(error) or type(error).__name__)


def _dump(value: Any, newline: str) -> str:
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = f"{newline}  "
    pairs = (f"{inner}{_dump(key, inner)}: {_dump(each, inner)}" for key, each in value.items())
    return f"{{{','.join(pairs)}{newline}}}"


def _cut(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
