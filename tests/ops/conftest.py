"""Every instruction set of the native kernels that this machine has, one after the other."""

import ctypes
import mmap

import pytest
import torch

from dynanet.ops.native import library


@pytest.fixture(params=["generic", "avx2", "avx512"])
def kernels(request):
    """Kernels for one instruction set in use."""
    if request.param not in library.instruction_sets():
        pytest.skip(f"no native kernels for {request.param} here")
    with library.using(request.param):
        yield request.param


@pytest.fixture
def fence():
    """Makes tensors that end where memory that must not be touched begins."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        pytest.skip("pages cannot be fenced here")
    return Fenced()


class Fenced:
    """Tensors that end where memory that must not be touched begins: a read beyond them ends the process."""

    def __init__(self) -> None:
        self.libc, self.maps = ctypes.CDLL(None, use_errno=True), []

    def __call__(self, values):
        pages = -(-values.numel() * values.element_size() // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert self.libc.mprotect(ctypes.c_void_p(begin + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
        self.maps.append((memory, begin))
        offset = pages * mmap.PAGESIZE - values.numel() * values.element_size()
        fenced = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset).view(values.shape)
        return fenced.copy_(values)
