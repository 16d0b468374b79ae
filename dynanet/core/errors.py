"""What users get when something is wrong: one line that says what came, what was expected and what to do.

Every error a user can cause derives from `DynanetError`; the command line prints its message and exits with code 2.
They also derive from `ValueError`, so that code which knows nothing of dynanet can catch them. Our own invariants are
`assert`s.
"""

from collections.abc import Collection, Sequence
from importlib import import_module
from types import ModuleType


class DynanetError(ValueError):
    """Something a user can mend. The message says what came, what was expected, and what to do."""


class InputError(DynanetError):
    """A tensor that a model cannot take: wrong channels or size, NaN or infinite values, the wrong dtype."""


class ConfigError(DynanetError):
    """A configuration with an unknown key, a missing one, or a value out of range."""


class StructureError(DynanetError):
    """A model built in a way that cannot be executed sparsely (say, a dynamic layer inside a spatial unit)."""


class BudgetError(DynanetError):
    """A budget that no path through the model meets, or that means nothing (a negative one, a risk of 2)."""


class DataError(DynanetError):
    """A data folder, file or split that cannot be used."""


class MissingSplitError(DataError):
    """A split that the data does not have."""


class BundleError(DynanetError):
    """A saved model that is damaged, altered, or not a saved model."""


class CheckpointError(DynanetError):
    """A training checkpoint that cannot be written, read, or that belongs to another model."""


class TrainingError(DynanetError):
    """A training run that cannot go on (a loss that is NaN, say)."""


class MissingExtraError(DynanetError, ImportError):
    """An optional dependency that is not installed, with the command that installs it."""


REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AssertionError, AttributeError)
"""What torch's layers, and those of users, raise when they are given an input that they cannot take."""


def cannot_take(error: Exception, rows: int) -> DynanetError:
    """Make the error for a model that refused an example: our own as it is, any other in one line.

    Args:
        error: one of `REFUSALS`.
        rows: samples that the model was given.
    """
    if isinstance(error, DynanetError):
        return error
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(
        f"the model cannot take this example of {rows} sample{'s' if rows > 1 else ''} ({reason}); give one that it "
        f"takes, or a model whose layers take any number of samples"
    )


def check_sizes(minimum: int = 1, /, **sizes: int | Sequence[int]) -> None:
    """Check that sizes are whole numbers of at least `minimum`: channels, classes, strides.

    Args:
        minimum: the least size that is allowed.
        sizes: by name, a number or a sequence in which every number is checked.

    Raises:
        ConfigError: naming the first that is too small or no `int`.
    """
    for name, value in sizes.items():
        for size in value if isinstance(value, Sequence) else (value,):
            if not isinstance(size, int) or isinstance(size, bool):
                raise ConfigError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
            if size < minimum:
                raise ConfigError(f"{name} must be at least {minimum}, got {value!r}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Check that a value is one of those allowed.

    Raises:
        ConfigError: listing the choices.
    """
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    A broken install (torchvision's CUDA wheel over CPU torch) raises RuntimeError, not ImportError, hence the breadth.
    """
    try:
        return import_module(module)
    except Exception as error:
        raise MissingExtraError(
            f"{module} is needed here and cannot be imported ({type(error).__name__}: {error}); "
            f"install it with: pip install 'dynanet[{extra}]'"
        ) from error


def check_shares(*, positive: bool = False, **shares: float) -> None:
    """Check that numbers are shares, from 0 to 1.

    Args:
        positive: 0 is not allowed.
        shares: by name.

    Raises:
        ConfigError: naming the first that is not.
    """
    for name, share in shares.items():
        if not 0 <= share <= 1 or (positive and share == 0):
            expected = "above 0 and at most 1" if positive else "between 0 and 1"
            raise ConfigError(f"{name} must be a share {expected}, got {share}")
