"""The library of native kernels: found, loaded when first asked for, and bound for one instruction set.

There may be none: no compiler was there at install, the processor is of another kind, or the environment variable
DYNANET_NATIVE is 0. Then everything runs on torch. DYNANET_NATIVE may also name an instruction set to use.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynanet.core.errors import ConfigError

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
SETS = {"generic": 8, "avx2": 16, "avx512": 32}
"""The instruction sets, best last, and how many columns a packed panel has in each."""


class Kernels:
    """The kernels for one instruction set, called with addresses and sizes.

    Attributes:
        name: of the instruction set.
        wide: columns of a packed panel.
        neurons_up: see kernels.h, as for the others.
        neurons_down: the second product of neuron blocks.
        product: gathered rows times packed weights.
        rows: images laid out as rows; see pixels.h, as for the next two.
        scores: of positions or tiles, from what lies around them and the image's mean.
        convolutions: at chosen positions.
        update_skip: a recurrent cell over sequences, called with the address of a structure.
        skim: two of them.
        attend: attention within samples of packed rows.
        means: of the rows of every sample.
    """

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        def bound(function: str, *kinds: Any, result: Any = None) -> Any:
            found = getattr(library, f"dynanet_{function}_{name}")
            found.argtypes, found.restype = kinds, result
            return found

        size, address = ctypes.c_long, ctypes.c_void_p
        self.name, self.wide = name, SETS[name]
        self.neurons_up = bound("neurons_up", *[size] * 4, *[address] * 4, size, address, address)
        self.neurons_down = bound("neurons_down", *[size] * 4, *[address] * 5)
        kinds = [size, address, *[size] * 4, *[address] * 6, size, address, size, size, address, size]
        self.product = bound("product", *kinds, result=ctypes.c_int)
        self.rows = bound("rows", *[size] * 3, address, address, size)
        self.scores = bound("scores", *[size] * 5, *[address] * 3, ctypes.c_float, address, address, size)
        kinds = [*[size] * 3, address, *[size] * 3, address, size, *[address] * 7, size, address, size]
        self.convolutions = bound("convolutions", *kinds, result=size)
        self.update_skip = bound("update_skip", address, size, result=ctypes.c_int)
        self.skim = bound("skim", address, size, result=ctypes.c_int)
        kinds = [size, address, size, size, *[address] * 3, *[size] * 3, address, address, *[size] * 3, address, size]
        self.attend = bound("attend", *kinds)
        self.means = bound("means", size, address, size, address, address)
        self._large_pages = library.dynanet_large_pages
        self._large_pages.argtypes, self._large_pages.restype = (address, size), None

    def room(self, *shape: int) -> Tensor:
        """Memory for what is read or written from end to end, in large pages where the system has them."""
        numbers = math.prod(shape)
        if 4 * numbers < 2 * _LARGE:
            return torch.empty(shape)
        memory = torch.empty(numbers + _LARGE // 4)
        first = -memory.data_ptr() % _LARGE // 4
        memory = memory[first : first + numbers]
        self._large_pages(memory.data_ptr(), 4 * numbers)
        return memory.view(shape)


def must(holds: bool, what: str) -> None:
    """What would be read out of bounds must not reach the kernels, under `python -O` neither.

    Raises:
        ValueError: naming what does not hold.
    """
    if not holds:
        raise ValueError(f"a native kernel got {what}")


def instruction_set() -> str:
    """Of the kernels in use; "" where there are none."""
    kernels = chosen()
    return "" if kernels is None else kernels.name


def instruction_sets() -> tuple[str, ...]:
    """All that the library offers on this processor, best last."""
    library = _library(HERE / "kernels.so")
    if library is None:
        return ()
    there = library.dynanet_sets()
    return tuple(name for bit, name in enumerate(SETS) if there >> bit & 1)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Kernels of this instruction set inside, none for "": for tests and comparisons.

    Raises:
        ConfigError: a set that the library does not offer here.
    """
    token = _USED.set(_kernels(name) if name else None)
    try:
        yield
    finally:
        _USED.reset(token)


def chosen() -> Kernels | None:
    """The kernels in use; None where there are none."""
    used = _USED.get()
    return _default() if isinstance(used, str) else used


def fit(*tensors: Tensor | None) -> bool:
    """Kernels are there, and they compute these tensors: float32 on the CPU, of which no gradient is wanted."""
    for t in tensors:
        if t is not None and (
            t.dtype is not torch.float32 or not t.is_cpu or (t.requires_grad and torch.is_grad_enabled())
        ):
            return False
    return not torch.compiler.is_compiling() and chosen() is not None


@functools.cache
def _default() -> Kernels | None:
    asked = os.environ.get("DYNANET_NATIVE", "")
    if asked == "0":
        return None
    there = instruction_sets()
    if asked in there:
        return _kernels(asked)
    if asked not in ("", "1"):
        log.warning("DYNANET_NATIVE is %r, and there are %s; taking the best", asked, there)
    return _kernels(there[-1]) if there else None


@functools.cache
def _kernels(name: str) -> Kernels:
    if name not in instruction_sets():
        raise ConfigError(f"there are no native kernels for {name!r} here, only for {instruction_sets()}; name one")
    library = _library(HERE / "kernels.so")
    assert library is not None
    return Kernels(library, name)


@functools.cache
def _library(path: Path) -> ctypes.CDLL | None:
    if not path.exists():
        return None
    try:
        library = ctypes.CDLL(str(path))
        library.dynanet_source.restype = ctypes.c_char_p
        made_from = library.dynanet_source().decode()
    except (OSError, AttributeError) as error:  # of another architecture, or damaged
        log.warning("the native kernels cannot be loaded (%s); running on torch alone", error)
        return None
    source = sorted([*path.parent.glob("*.c"), *path.parent.glob("*.h")])
    if source and made_from != hashlib.sha256(b"".join(file.read_bytes() for file in source)).hexdigest()[:16]:
        log.warning("the native kernels are older than their source; install dynanet again. Running on torch alone")
        return None
    return library


_LARGE = 2 * 2**20  # bytes of a large page
_USED: ContextVar[Kernels | str | None] = ContextVar("dynanet_native", default="best")
