"""What is drawn depends on the seed and the place alone, and leaves no trace in the global generators."""

import random

import numpy as np
import pytest
import torch

from dynanet.train.seeds import seed_all, seed_of, seeded


def drawn():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


def test_places_have_seeds_of_their_own_that_stay():
    places = [(seed, epoch, purpose) for seed in range(5) for epoch in range(5) for purpose in ("data", "gates")]
    assert len({seed_of(*place) for place in places}) == 50
    assert all(0 <= seed_of(*place) < 2**64 for place in places)
    assert seed_of(0, 1, "data") == 9171368405021055189, "resumed runs depend on it"


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_a_seed_draws_the_same_from_every_generator(seed):
    with seeded(0):
        seed_all(seed)
        first = drawn()
        seed_all(seed)
        assert drawn() == first
        seed_all(seed ^ 1)
        assert all(a != b for a, b in zip(drawn(), first, strict=True))


def test_after_the_block_draws_go_on_as_if_it_had_not_been():
    with seeded(7):
        expected = [drawn(), drawn()]
    with seeded(7):
        found = [drawn()]
        with seeded(8):
            inside = drawn()
        found.append(drawn())
    assert found == expected and inside not in expected


def test_states_are_restored_when_the_block_fails():
    with seeded(7):
        expected = drawn()
    with seeded(7):
        with pytest.raises(ZeroDivisionError), seeded(8):
            drawn()
            raise ZeroDivisionError
        assert drawn() == expected
