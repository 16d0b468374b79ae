"""A run to work with, on one thread."""

import shutil
from pathlib import Path

import pytest
import torch

from dynanet.experiment import Run


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(digits_run, tmp_path):
    """A calibrated run of one's own."""
    return Run(Path(shutil.copytree(digits_run, tmp_path / "digits")))
