"""Commands called in this process, and a run to call them on."""

import shutil
from pathlib import Path

import pytest
import torch

from dynanet.cli.commands import main


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def call(capsys):
    """(arguments...) -> (exit code, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(call):
    """(arguments...) -> the one line on stderr, after exit code 2 and nothing on stdout."""

    def refused(*arguments) -> str:
        code, out, err = call(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("dynanet: ") and err.count("\n") == 1, err
        return err

    return refused


@pytest.fixture
def run(digits_run, tmp_path):
    """A calibrated run of one's own."""
    return Path(shutil.copytree(digits_run, tmp_path / "digits"))
