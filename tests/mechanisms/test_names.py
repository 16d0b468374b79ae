"""The names that the package hands on are those of its files."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dynanet
from dynanet import mechanisms

FILES = sorted(path.stem for path in Path(mechanisms.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("file", FILES)
def test_every_public_class_and_function_is_handed_on(file):
    module = import_module(f"dynanet.mechanisms.{file}")
    public = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]
    assert public
    for name in public:
        assert name in mechanisms.__all__, name
        assert getattr(dynanet.mechanisms, name) is getattr(module, name)


def test_type_checkers_see_the_same_names():
    text = Path(mechanisms.__file__).read_text()
    seen = text.split("if TYPE_CHECKING:")[1].split("_NAMES")[0]
    for name in mechanisms.__all__:
        assert seen.count(f" {name},") + seen.count(f" {name}\n") == 1, name


def test_a_name_imports_its_file_and_no_other():
    code = (
        "import sys; from dynanet.mechanisms import LayerSkip; "
        "print(*(m for m in sys.modules if m.startswith('dynanet.mechanisms.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["dynanet.mechanisms.layer_skip"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LateExit'"):
        mechanisms.LateExit  # noqa: B018
