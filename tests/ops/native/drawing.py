"""Random sizes and numbers for the kernels, and how close to torch their answers must be."""

import hypothesis
import torch
from hypothesis import strategies as st

quick = hypothesis.settings(
    deadline=None, max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


@st.composite
def numbers(draw, *names):
    return {name: draw(st.integers(low, high)) for name, low, high in names}


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
