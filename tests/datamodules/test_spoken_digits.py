import numpy as np
import pytest
import torch

from dynanet.core.errors import DataError
from dynanet.datamodules import SpokenDigitsDataModule
from tests.data.test_speech import write


def steps(batches):
    """All frames of all sequences, (N, features)."""
    return torch.cat([frames[:length] for x, _ in batches for frames, length in zip(*x, strict=True)])


def test_digits_are_standardised_by_what_is_trained_with(tmp_path):
    draw = np.random.default_rng(0)
    for index in (0, 5, 10, 11):
        for digit in (3, 8):
            loud = 3000 if index < 5 else 300
            write(tmp_path / "recordings" / f"{digit}_a_{index}.wav", draw.normal(0, loud, 800).astype(int))
    found = SpokenDigitsDataModule(str(tmp_path), batch=2)
    assert [sum(len(y) for _, y in part) for part in (found.train, found.held_out, found.test)] == [4, 2, 2]
    frames = steps(found.train)
    torch.testing.assert_close(frames.mean(0), torch.zeros(40), rtol=0, atol=1e-4)
    torch.testing.assert_close(frames.std(0, correction=0), torch.ones(40), rtol=0, atol=1e-4)
    assert steps(found.test).mean() > 1, "louder, and left so"


def test_without_recordings_the_part_that_lacks_them_is_named(tmp_path):
    module = SpokenDigitsDataModule(str(tmp_path))
    assert "opened" not in vars(module), "nothing is read before it is used"
    with pytest.raises(DataError, match="no recordings of the train part"):
        module.setup()
