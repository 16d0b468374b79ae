"""The library of native kernels is built where it can be, refused where it does not fit, and never in the way."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynanet.core.errors import ConfigError
from dynanet.ops.native import library

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "dynanet" / "ops" / "native"


@pytest.fixture(scope="module")
def build():
    pytest.importorskip("hatchling")
    if not (ROOT / "hatch_build.py").exists():
        pytest.skip("not in a checkout")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    for source in (*SOURCE.glob("*.c"), *SOURCE.glob("*.h")):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    return tmp_path


def test_without_a_compiler_there_is_no_library(build, folder, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    assert build.compiled(folder) == (None, "there is no C compiler")


@pytest.mark.parametrize("compiler", ["false", "true", "/nowhere/cc", "sh -c 'echo what is vector_size >&2; exit 1'"])
def test_a_broken_compiler_is_told_and_survived(build, folder, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    built, why = build.compiled(folder)
    assert built is None and "compiler" in why
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted(path.name for path in SOURCE.iterdir() if path.suffix in (".c", ".h")), (
        "nothing is left behind"
    )


def test_the_hook_tells_what_kind_of_wheel_it_is(build, folder, monkeypatch):
    class App:
        said = []

        def display_warning(self, message):
            self.said.append(message)

    def hook(result):
        monkeypatch.setattr(build, "compiled", lambda folder: result)
        made = build.NativeKernels(str(ROOT), {}, None, None, str(folder), "wheel", App())
        data = {"artifacts": [], "pure_python": True}
        made.initialize("standard", data)
        return data

    data = hook((folder / "kernels.so", ""))
    assert data["artifacts"] == ["/dynanet/ops/native/kernels.so"] and not data["pure_python"]
    assert data["tag"].startswith("py3-none-") and "-" not in data["tag"].removeprefix("py3-none-")
    assert hook((None, "there is no C compiler")) == {"artifacts": [], "pure_python": True}
    assert "without native kernels (there is no C compiler)" in App.said[0]


def test_what_cannot_be_loaded_is_left_alone(folder, caplog):
    assert library._library(folder / "kernels.so") is None and not caplog.messages
    (folder / "kernels.so").write_bytes(b"\x7fELF of another machine")
    assert library._library.__wrapped__(folder / "kernels.so") is None
    assert "cannot be loaded" in caplog.text


@pytest.mark.skipif(not library.instruction_sets(), reason="no native kernels here")
def test_a_library_older_than_its_source_is_refused(folder, caplog):
    (folder / "kernels.so").write_bytes((SOURCE / "kernels.so").read_bytes())
    assert library._library.__wrapped__(folder / "kernels.so") is not None
    with (folder / "kernels.h").open("a") as file:
        file.write("/* new */")
    assert library._library.__wrapped__(folder / "kernels.so") is None
    assert "older than their source" in caplog.text


def in_a_process(code, native):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "DYNANET_NATIVE": native, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


FORMS = """
import torch
from torch import nn
from dynanet import execute
from dynanet.core.gate import Gate
from dynanet.gates.rules import TopK
from dynanet.mechanisms.neuron_skip import LowRankScorer, NeuronSkip
from dynanet.ops.native.library import instruction_set
torch.manual_seed(0)
layer = NeuronSkip(nn.Linear(9, 32), nn.Linear(32, 9), Gate(LowRankScorer(9, 8), TopK(3), units=8), block=4).eval()
with torch.no_grad():
    print(instruction_set() or "none", execute(layer, sparse=True)(torch.ones(2, 9)).sum().item())
"""


def test_the_environment_turns_it_off_and_chooses():
    torch_alone, best = in_a_process(FORMS, "0"), in_a_process(FORMS, "")
    assert torch_alone[0] == "none"
    assert best[0] == (library.instruction_sets() or ("none",))[-1]
    assert float(best[1]) == pytest.approx(float(torch_alone[1]), rel=1e-4, abs=1e-5)
    for name in library.instruction_sets():
        assert in_a_process(FORMS, name)[0] == name


def test_using_names_what_there_is():
    with library.using(""):
        assert library.instruction_set() == "" and not library.fit(torch.ones(2))
    with pytest.raises(ConfigError, match="sse9"), library.using("sse9"):
        pass


def test_what_kernels_compute(kernels):
    weight = torch.nn.Parameter(torch.ones(2))
    assert library.instruction_set() == kernels
    assert library.fit(torch.ones(2), None)
    assert not library.fit(weight), "a gradient may be wanted"
    with torch.no_grad():
        assert library.fit(weight)
        assert not library.fit(torch.ones(2).double()) and not library.fit(torch.ones(2).bfloat16())
        assert not library.fit(torch.ones(2, device="meta"))
