"""The names that the package hands on are those of its files."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest

from dynanet import nets

FILES = sorted(path.stem for path in Path(nets.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("file", FILES)
def test_every_public_class_and_function_is_handed_on(file):
    module = import_module(f"dynanet.nets.{file}")
    public = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]
    assert public
    for name in public:
        assert name in nets.__all__, name
        assert getattr(nets, name) is getattr(module, name)
