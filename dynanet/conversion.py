"""Replace named children of a static network by dynamic layers around them."""

import copy
import re
from collections.abc import Callable, Mapping

from torch import nn

from dynanet.core.errors import StructureError


def convert(model: nn.Module, changes: Mapping[str, Callable[[nn.Module], nn.Module]]) -> nn.Module:
    """A copy of a model in which the named children are wrapped.

    Args:
        model: any module; it is not changed, and the weights of the copy are its own.
        changes: from a pattern of names (a regular expression that must match the whole name) to what makes the new
            child of the old one.

    Returns:
        The new model.

    Raises:
        StructureError: a pattern that matches no child, a child matched twice, or one inside another that is matched.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> gate = lambda: Gate(nn.Linear(4, 1), StraightThrough())                       # doctest: +SKIP
        >>> convert(net, {"1": lambda block: LayerSkip(block, gate())})                   # doctest: +SKIP
    """
    model = copy.deepcopy(model)
    names = [name for name, _ in model.named_modules() if name]
    chosen: dict[str, Callable[[nn.Module], nn.Module]] = {}
    for pattern, make in changes.items():
        matched = [name for name in names if re.fullmatch(pattern, name)]
        if not matched:
            raise StructureError(f"no child matches {pattern!r}; there are {', '.join(names[:12])}, ...")
        for name in matched:
            if name in chosen:
                raise StructureError(f"{name!r} is matched by two patterns; let one of them match it")
            chosen[name] = make
    for name in chosen:
        outer = next((other for other in chosen if name.startswith(other + ".")), None)
        if outer:
            raise StructureError(f"{name!r} lies inside {outer!r}, and both are to be changed; convert in two calls")
    for name, make in chosen.items():
        model.set_submodule(name, make(model.get_submodule(name)))
    return model
