"""HTML and SVG as nested calls. Text is escaped unless it is `Markup`, so that names from data cannot be markup."""

import html
import re
from collections.abc import Iterable, Mapping

_VOID = {"br", "col", "hr", "img", "meta"}
_UNFIT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # not allowed in HTML


class Markup(str):
    """Text that is HTML and is not escaped."""


def tag(name: str, *inside: object, at: Mapping[str, object] | None = None) -> Markup:
    """An element. Floats are written with two decimals, other objects as text; None is left out.

    >>> tag("td.wide", "a < b", at={"title": 'say "a"'})
    '<td class="wide" title="say &quot;a&quot;">a &lt; b</td>'

    Args:
        name: of the element, its classes after dots.
        inside: text and elements.
        at: attributes; those that are None are left out.
    """
    name, *classes = name.split(".")
    attributes = ({"class": " ".join(classes)} if classes else {}) | dict(at or {})
    written = "".join(f' {key}="{_escaped(value)}"' for key, value in attributes.items() if value is not None)
    return Markup(f"<{name}{written}>" + ("" if name in _VOID else f"{join(inside)}</{name}>"))


def join(parts: Iterable[object]) -> Markup:
    """Concatenate text, which is escaped, and elements."""
    return Markup("".join(part if isinstance(part, Markup) else _escaped(part) for part in parts if part is not None))


def _escaped(value: object) -> str:
    if isinstance(value, float):
        value = f"{value:.2f}".rstrip("0").rstrip(".")
    return html.escape(_UNFIT.sub("\ufffd", str(value)))
