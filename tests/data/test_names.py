"""The package hands on its datasets and loaders, and imports them when they are first used."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dynanet import data

FILES = sorted(path.stem for path in Path(data.__file__).parent.glob("*.py") if path.stem != "__init__")


def test_every_name_is_that_of_its_file():
    assert sorted(data._FILE_OF) == sorted(data.__all__)
    for name, file in data._FILE_OF.items():
        assert getattr(data, name) is vars(import_module(f"dynanet.data{file}"))[name]


@pytest.mark.parametrize("file", FILES)
def test_every_loader_is_handed_on(file):
    module = import_module(f"dynanet.data.{file}")
    loaders = [name for name, value in vars(module).items() if name.startswith("load_") and inspect.isfunction(value)]
    for name in loaders:
        assert getattr(data, name) is getattr(module, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_nothing'"):
        data.load_nothing  # noqa: B018


def test_nothing_is_imported_before_it_is_used():
    code = "import sys, dynanet.data; print([m for m in sys.modules if m.startswith('dynanet.data.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
