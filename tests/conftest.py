"""For all tests: graphs that sessions export go to a folder of this test run, never to the user's cache."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory):
    before, folder = os.environ.get("DYNANET_CACHE"), tmp_path_factory.mktemp("cache")
    os.environ["DYNANET_CACHE"] = str(folder)
    yield folder / "engines"
    if before is None:
        del os.environ["DYNANET_CACHE"]
    else:
        os.environ["DYNANET_CACHE"] = before
