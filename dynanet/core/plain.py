"""Layers that compute what their type says, so that something else may compute it in their stead."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

from torch import nn

from dynanet.core.errors import StructureError


class Watcher:
    """A forward pre-hook that looks at a module's arguments and changes nothing: the module stays plain.

    Args:
        see: called with the arguments, and with those by name.
    """

    def __init__(self, see: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        self._see = see

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look; for `register_forward_pre_hook(..., with_kwargs=True)`."""
        self._see(args, kwargs)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these kinds and computes exactly what that kind does.

    A subclass may compute anything, and so may a forward hook (weight norm and pruning are hooks) or a forward of the
    module's own; a re-parametrised layer has a class of its own. A subclass that adds only a constructor is plain.
    """
    kind: Any = type(module)
    return _adds_nothing(kind, kinds) and not hooked(module)


def is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a module calls its children one after the other, and does nothing else between them."""
    kind: Any = type(module)
    return _adds_nothing(kind, (nn.Sequential,)) and "forward" not in vars(module)


def check_plain(module: nn.Module, *kinds: type[nn.Module]) -> None:
    """Check that a module whose weights are used in its stead is plain.

    Raises:
        StructureError: it is not.
    """
    if not is_plain(module, *kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise StructureError(
            f"got a {type(module).__name__} whose weights would be used in its stead; expected a plain {expected}, "
            f"no subclass, without forward hooks (weight norm and pruning are hooks) and parametrizations: make its "
            f"weights permanent first"
        )


def hooked(module: nn.Module) -> bool:
    """Whether a module has forward hooks that may change something, or a forward of its own."""
    if module._forward_hooks or module._forward_pre_hooks:
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(isinstance(hook, Watcher) for hook in hooks):
            return True
    return "forward" in vars(module)


def _adds_nothing(kind: Any, kinds: Any) -> bool:
    if kind in kinds:
        return True
    if not issubclass(kind, kinds):
        return False
    return all(set(vars(base)) <= _HARMLESS for base in kind.__mro__[: _first(kind.__mro__, kinds)])


def _first(order: Sequence[type], kinds: Sequence[type]) -> int:
    return next(i for i, base in enumerate(order) if base in kinds)


_HARMLESS = {
    "__init__", "__module__", "__doc__", "__annotations__", "__qualname__", "__firstlineno__", "__static_attributes__",
    "__annotate_func__", "__annotations_cache__", "extra_repr", "__parameters__", "__orig_bases__",
}  # fmt: skip
