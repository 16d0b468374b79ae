"""How a model was built: the name of a function of the zoo and the arguments it was given.

A saved model names its architecture, never code: the loader looks the name up among functions that are installed.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Architecture:
    """What a model remembers of its making, as the plain attribute `model.architecture`.

    Attributes:
        name: the builder's name, `msdnet`.
        arguments: every argument by its name, defaults included, so that a later default changes no saved model.
        builder: the function itself. It stays in memory: files hold its name only.
    """

    name: str
    arguments: dict[str, Any]
    builder: Callable[..., nn.Module]


def architecture(builder: Callable[P, M]) -> Callable[P, M]:
    """Decorate a function of the zoo so that its models can be saved.

    The function takes named arguments that JSON can hold (numbers, strings, lists), and must work on the meta device:
    no `.item()` and no `.tolist()` on tensors made while building.

    >>> @architecture
    ... def line(features: int = 3) -> nn.Module:
    ...     return nn.Linear(features, 1)
    >>> architecture_of(line()).arguments
    {'features': 3}
    """
    signature = inspect.signature(builder)
    assert all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()), builder

    @functools.wraps(builder)
    def build(*args: P.args, **kwargs: P.kwargs) -> M:
        model = builder(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        vars(model)["architecture"] = Architecture(builder.__name__, dict(given.arguments), build)
        return model

    return build


def architecture_of(model: nn.Module) -> Architecture | None:
    """How the model was built; None for a model that no function of the zoo made."""
    found = getattr(model, "architecture", None)
    return found if isinstance(found, Architecture) else None
