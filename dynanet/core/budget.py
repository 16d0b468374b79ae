"""A Budget limits what a model may spend, or what it may lose by spending less."""

import math
from dataclasses import dataclass, fields
from numbers import Real

from dynanet.core.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """The limits for a model. At least one of `macs`, `ms`, `risk` and `cap_macs` is given; all that are given hold.

    >>> Budget(macs=2e6)
    Budget(macs=2000000.0)
    >>> Budget(risk=0.05, confidence=0.95)
    Budget(risk=0.05, confidence=0.95)

    Attributes:
        macs: multiply-accumulates per sample, in the mean.
        ms: milliseconds per sample, in the mean.
        risk: the expected loss that leaving early may cause, in (0, 1); promised with `confidence`.
        confidence: probability, over the draw of the held-out set, that the promised risk is kept; in (0, 1).
        cap_macs: multiply-accumulates that no sample may exceed, whatever its scores say.

    Raises:
        BudgetError: no limit is given, or a number that means nothing (a negative cost, a risk of 2).
    """

    macs: float | None = None
    ms: float | None = None
    risk: float | None = None
    confidence: float = 0.9
    cap_macs: float | None = None

    def __post_init__(self) -> None:
        if self.macs is None and self.ms is None and self.risk is None and self.cap_macs is None:
            raise BudgetError("this budget has no limit; give at least one of macs=, ms=, risk=, cap_macs=")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name != "confidence":
                continue
            if not isinstance(value, Real) or isinstance(value, bool):
                raise BudgetError(f"{field.name}={value!r} is a {type(value).__name__}; give a number")
            number = float(value)
            if field.name in ("risk", "confidence"):
                if not 0 < number < 1:
                    raise BudgetError(f"{field.name} must be a probability between 0 and 1, got {number:g}")
            elif not 0 < number < math.inf:
                raise BudgetError(f"{field.name} must be a cost per sample above 0, got {number:g}")
            object.__setattr__(self, field.name, number)

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if self.risk is None:  # without a risk nothing is promised, and the confidence is idle
            del given["confidence"]
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in given.items())})"
