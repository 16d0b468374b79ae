"""For all tests: graphs that sessions export go to a folder of this test run, never to the user's cache."""

import functools
import os

import pytest
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
