"""What users may import is decided, not grown: a new public name is a change of this file."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dynanet

NAMES = [
    "Budget",
    "CostModel",
    "Decision",
    "Dynamic",
    "DynanetError",
    "Gate",
    "Halt",
    "Trace",
    "convert",
    "execute",
    "forced",
    "load",
    "record",
]
FOLDERS = [
    "bench", "calibrate", "data", "datamodules", "experiment", "export", "gates", "generate", "mechanisms", "nets",
    "ops", "report", "session", "tasks", "train", "zoo",
]  # fmt: skip
HEAVY = [  # what only some users have or want, and what takes seconds
    "PIL",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "plotly",
    "pyarrow",
    "pycocotools",
    "scipy",
    "sklearn",
    "tensorly",
    "torch._dynamo",
    "torch.onnx",
    "torchmetrics",
    "tokenizers",
    "torchvision",
    "transformers",
]


def in_a_fresh_python(code):
    """What it prints, as words. Warnings are errors there too."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_public_names():
    assert sorted(dynanet.__all__) == NAMES


def test_every_public_name_is_there_and_documented():
    for name in NAMES:
        assert getattr(dynanet, name).__doc__, name


def test_folders_are_imported_when_they_are_asked_for():
    for name in FOLDERS:
        assert getattr(dynanet, name) is import_module(f"dynanet.{name}")
    there = {path.parent.name for path in Path(dynanet.__file__).parent.glob("*/__init__.py")}
    assert there - {"cli", "core"} == set(FOLDERS)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'skynet'"):
        dynanet.skynet  # noqa: B018


def heavier(statement):
    """Seconds of processor time that a statement takes beyond torch's import, and what heavy modules it brings."""
    code = f"""
import time, torch, sys
there = set(sys.modules)
start = time.process_time()
{statement}
print(time.process_time() - start, *(m for m in {HEAVY} if m in sys.modules and m not in there))
"""
    seconds, *brought = in_a_fresh_python(code)
    return float(seconds), brought


def test_importing_is_quick_and_imports_no_extra():
    seconds, brought = heavier("import dynanet")
    assert brought == []
    assert seconds < 2 or heavier("import dynanet")[0] < 2, "slow twice over is no accident"


def test_folders_import_no_extra_either():
    """All but `train`, which is Lightning's place."""
    folders = sorted(set(FOLDERS) - {"train"})
    _, brought = heavier(f"import dynanet; {[f'dynanet.{folder}' for folder in folders]}".replace("'", ""))
    assert brought == []
