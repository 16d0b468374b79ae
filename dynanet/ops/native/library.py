"""The library of native kernels: found, loaded at first use, and bound for one instruction set.

There may be none: no compiler at install, another kind of processor, or the environment variable DYNANET_NATIVE is 0.
Then everything runs on torch. DYNANET_NATIVE may also name an instruction set to use.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
from collections.abc import Iterable, Iterator
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
        name: the instruction set.
        wide: columns of a packed panel.
        neurons_up: the first product of neuron blocks; see kernels.h, as for the others.
        neurons_down: the second product of neuron blocks.
        product: gathered rows times packed weights.
        rows: images laid out as rows; see pixels.h, as for the next two.
        scores: scores of positions or tiles, from their neighbourhood and the image's mean.
        convolutions: convolutions at chosen positions.
        update_skip: a recurrent cell over sequences, called with the address of a structure.
        skim: two cells over sequences, likewise.
        attend: attention within samples of packed rows.
        means: the mean of every sample's rows.
    """

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        def bound(function: str, *kinds: Any, result: Any = None) -> Any:
            found = getattr(library, f"dynanet_{function}_{name}")
            found.argtypes, found.restype = kinds, result
            return found

        size, address = ctypes.c_long, ctypes.c_void_p
        self.name = name
        self.wide = SETS[name]
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
        """Allocate memory that is read or written from end to end, in large pages where the system has them."""
        numbers = math.prod(shape)
        if 4 * numbers < 2 * _LARGE:
            return torch.empty(shape)
        memory = torch.empty(numbers + _LARGE // 4)
        first = -memory.data_ptr() % _LARGE // 4
        memory = memory[first : first + numbers]
        self._large_pages(memory.data_ptr(), 4 * numbers)
        return memory.view(shape)


def must(holds: bool, what: str) -> None:
    """Check what kernels rely on: they would read out of bounds. Unlike `assert`, it holds under `python -O` too.

    Raises:
        ValueError: the condition does not hold.
    """
    if not holds:
        raise ValueError(f"a native kernel got {what}")


def instruction_set() -> str:
    """Return the instruction set of the kernels in use; "" if there are none."""
    kernels = chosen()
    return "" if kernels is None else kernels.name


def instruction_sets() -> tuple[str, ...]:
    """Return all instruction sets that the library offers on this processor, best last."""
    library = _library(HERE / "kernels.so")
    if library is None:
        return ()
    there = library.dynanet_sets()
    return tuple(name for bit, name in enumerate(SETS) if there >> bit & 1)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use kernels of this instruction set inside, none for "": for tests and comparisons.

    Raises:
        ConfigError: a set that the library does not offer here.
    """
    token = _USED.set(_kernels(name) if name else None)
    try:
        yield
    finally:
        _USED.reset(token)


def chosen() -> Kernels | None:
    """Return the kernels in use; None if there are none."""
    used = _USED.get()
    return _default() if isinstance(used, str) else used


def fit(*tensors: Tensor | None) -> bool:
    """Whether native kernels can compute with these tensors: float32 on the CPU, without a gradient."""
    for t in tensors:
        if t is not None and (
            t.dtype is not torch.float32 or not t.is_cpu or (t.requires_grad and torch.is_grad_enabled())
        ):
            return False
    return not torch.compiler.is_compiling() and chosen() is not None


def check_floats(*tensors: Tensor | None) -> None:
    """Check that tensors can be read by address.

    Raises:
        ValueError: a tensor that is not contiguous float32 memory of the CPU.
    """
    for t in tensors:
        fits = t is None or (t.dtype is torch.float32 and t.is_cpu and t.is_contiguous())
        must(fits, "tensors that are not float32 on the CPU, in one piece")


def address(t: Tensor | None) -> int | None:
    """Return the address of a tensor's memory; None, C's null, without one."""
    return None if t is None else t.data_ptr()


def states(weights: Iterable[Tensor | None]) -> list[tuple[int, int, bool] | None]:
    """Return what changes when torch changes weights: version, address and whether a gradient is wanted."""
    return [None if p is None else (p._version, p.data_ptr(), p.requires_grad) for p in weights]


@functools.cache
def _default() -> Kernels | None:
    wanted = os.environ.get("DYNANET_NATIVE", "")
    if wanted == "0":
        return None
    there = instruction_sets()
    if wanted in there:
        return _kernels(wanted)
    if wanted not in ("", "1"):
        log.warning("DYNANET_NATIVE is %r, but the instruction sets here are %s; using the best", wanted, there)
    return _kernels(there[-1]) if there else None


@functools.cache
def _kernels(name: str) -> Kernels:
    if name not in instruction_sets():
        raise ConfigError(f"no native kernels for {name!r} here; expected one of {instruction_sets()}")
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
