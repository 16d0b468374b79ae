"""JSON that strangers may have written: parsed strictly, held within bounds, quoted in one line."""

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
    """The one way we write JSON, a line per key: the same value always gives the same bytes."""
    return _dump(value, "\n").encode()


def parse(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8: no key twice, no NaN, no nesting that exhausts the stack.

    Raises:
        BundleError: it is not one. `where` names the file.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is damaged: {line(error)}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{where} holds {short(value)}; expected a JSON object")
    return value


def check_keys(value: Any, expected: set[str], where: str) -> None:
    """Exactly these keys: one more may be one that changes what the others mean."""
    if not isinstance(value, dict) or set(value) != expected:
        found = sorted(value) if isinstance(value, dict) else value
        raise BundleError(f"{where} has {short(found)}; expected exactly {', '.join(sorted(expected))}")


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """The value as JSON holds it, within bounds; tuples become lists.

    Raises:
        BundleError: a number, string or list out of bounds, or another type.
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
    """A value for a message: one short line, whatever somebody has put there."""
    return _cut(_REPR.repr(value))


def line(error: Exception) -> str:
    """An error for a message: one line."""
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
        raise ValueError("a key stands there twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
