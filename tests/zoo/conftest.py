"""Key-seeded weights: they follow from their names, so that logits can be compared without storing weights."""

import math
import zlib

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def weight():
    """(name, shape) -> the float32 tensor that the parity cases' README gives that name."""

    def weight(key: str, shape) -> torch.Tensor:
        draw = np.random.default_rng(zlib.crc32(key.encode()))
        if key.endswith("running_var"):
            value = draw.uniform(0.5, 1.5, shape)
        elif key.endswith("running_mean"):
            value = draw.normal(0, 0.1, shape)
        elif len(shape) == 1 and key.endswith("weight"):
            value = draw.uniform(0.5, 1.5, shape)
        elif len(shape) <= 1:
            value = draw.normal(0, 0.1, shape)
        else:
            value = draw.normal(0, math.sqrt(2 / np.prod(shape[1:])), shape)
        return torch.tensor(value, dtype=torch.float32)

    return weight


@pytest.fixture(scope="session")
def seeded_input():
    def seeded_input(shape) -> torch.Tensor:
        return torch.tensor(np.random.default_rng(zlib.crc32(b"input")).normal(0, 1, shape), dtype=torch.float32)

    return seeded_input


@pytest.fixture(scope="session")
def seeded(weight):
    """A model with key-seeded weights, in eval mode."""

    def seeded(model: torch.nn.Module) -> torch.nn.Module:
        state = model.state_dict()
        drawn = {k: weight(k, v.shape) for k, v in state.items() if v.is_floating_point() and k != "thresholds"}
        model.load_state_dict(drawn, strict=False)
        return model.eval()

    return seeded
