"""For all tests: graphs that sessions export go to a folder of this test run, never to the user's cache."""

import functools
import os

import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory):
    before, folder = os.environ.get("DYNANET_CACHE"), tmp_path_factory.mktemp("cache")
    os.environ["DYNANET_CACHE"] = str(folder)
    yield folder / "engines"
    if before is None:
        del os.environ["DYNANET_CACHE"]
    else:
        os.environ["DYNANET_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def one_library_of_operators():
    """The exporter reads its whole library anew for every graph, which takes most of its time; once is enough here."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
    yield
    patch.undo()


TINY = {"widths": [4, 8], "depths": [1, 1], "context": 4}


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """A run of the command line on handwritten digits, trained and calibrated; not to be written to."""
    from dynanet.experiment import RequestedBudgets, Run
    from dynanet.experiment.config import Data, Experiment, Model, Recipe

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = Recipe(epochs=6, batch=64, lr=0.1)
    experiment = Experiment(Data("digits"), Model("staged_resnet", TINY), recipe)
    run = Run(tmp_path_factory.mktemp("runs") / "digits", experiment)
    run.train(progress=False)
    run.calibrate(RequestedBudgets(shares=(0.75,), risk=0.1))
    torch.set_num_threads(threads)
    return run.folder
