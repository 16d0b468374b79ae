"""Every instruction set of the native kernels that this machine has, one after the other."""

import pytest

from dynanet.ops.native import library


@pytest.fixture(params=["generic", "avx2", "avx512"])
def kernels(request):
    """Kernels for one instruction set in use."""
    if request.param not in library.instruction_sets():
        pytest.skip(f"no native kernels for {request.param} here")
    with library.using(request.param):
        yield request.param
