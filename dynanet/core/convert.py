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
            child of the old one. A child that stands in several places is made once, and stands in all of them again.

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
    children = {name: child for name, child in model.named_modules(remove_duplicate=False) if name}
    chosen: dict[str, str] = {}
    for pattern in changes:
        matched = [name for name in children if re.fullmatch(pattern, name)]
        if not matched:
            names = ", ".join(map(repr, [*children][:12]))
            raise StructureError(
                f"no child is named {pattern!r}, which must match the whole name; the first names are {names}: give a "
                f"regular expression for some of those in `model.named_modules()`"
            )
        for name in matched:
            other = next((n for n in chosen if children[n] is children[name] and chosen[n] != pattern), None)
            if other:
                raise StructureError(f"{name!r} is matched by {chosen[other]!r} and {pattern!r}; let one match it")
            chosen[name] = pattern
    for name in chosen:
        outer = next((other for other in chosen if name.startswith(other + ".")), None)
        if outer:
            raise StructureError(f"{name!r} lies inside {outer!r}, and both are to be changed; convert in two calls")
    for old, pattern in {children[name]: pattern for name, pattern in chosen.items()}.items():
        new = changes[pattern](old)
        for name, child in children.items():
            if child is old:
                model.set_submodule(name, new)
    return model
