"""Figures as text: few digits, units and signs."""

import math
from collections.abc import Mapping


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage.

    >>> percent(0.4472)
    '44.7 %'
    """
    return f"{100 * share:.{digits}f} %"


def short_percent(share: float) -> str:
    """A share that a user chose, with the digits it has.

    >>> short_percent(0.05)
    '5 %'
    """
    return f"{100 * share:.3g} %"


def maybe_percent(share: float | None) -> str:
    """A share as a percentage, or a dash for None."""
    return "–" if share is None else percent(share)


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign.

    >>> points(-0.0204)
    '−2.0'
    """
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def quantity(value: float) -> str:
    """A count in three digits, with k, M, G or T.

    >>> quantity(3976000.0)
    '3.98 M'
    """
    if value == 0:
        return "0"
    power = min(max(math.floor(math.log10(abs(value)) / 3 + 1e-12), 0), 4)
    scaled = value / 1000**power
    digits = 0 if power == 0 and value == int(value) else max(0, 2 - math.floor(math.log10(abs(scaled))))
    return f"{scaled:.{digits}f} {' kMGT'[power]}".strip()


def pairs(values: Mapping[str, object]) -> str:
    """Names and values, as keyword arguments.

    >>> pairs({"widths": [16, 32], "stem_stride": 1, "kind": "se"})
    'widths=[16, 32], stem_stride=1, kind=se'
    """
    return ", ".join(f"{name}={_typed(value)}" for name, value in values.items())


def _typed(value: object) -> str:
    if isinstance(value, Mapping):
        return f"({pairs(value)})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_typed(each) for each in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
