"""What stands beside every figure."""

import csv
import json
import subprocess
from pathlib import Path

import pytest
import torch

import dynanet
from dynanet.bench import machine
from dynanet.bench.machine import append_rows, facts


def test_all_columns_are_there():
    found = facts()
    assert list(found) == ["device", "cores", "load", "torch", "onnxruntime", "dynanet", "commit"]
    assert all(isinstance(value, str) for value in found.values())
    assert found["torch"] == torch.__version__ and found["dynanet"] == dynanet.__version__
    assert int(found["cores"]) >= 1 and float(found["load"]) >= 0 and found["device"]
    assert json.loads(json.dumps(found)) == found


def test_the_commit_is_that_of_the_checkout():
    here = Path(machine.__file__).parent
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
    if found.returncode:
        pytest.skip("not a checkout")
    assert facts()["commit"].rstrip("+") == found.stdout.strip()


@pytest.mark.parametrize("failure", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")])
def test_without_git_there_is_no_commit(failure, monkeypatch):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(subprocess, "run", fail)
    assert facts()["commit"] == ""


def test_without_a_package_there_is_no_version(monkeypatch):
    def missing(name):
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "version", missing)
    assert facts()["onnxruntime"] == ""


def test_rows_of_measurements_add_up(tmp_path):
    path = tmp_path / "bench.csv"
    path.write_text("batch,older\n4,yes\n")
    append_rows(path, [{"batch": 8, "ms": 1.5}], {"data": "digits"})
    append_rows(path, [{"batch": 16}, {"batch": 32, "ms": 2.5}], {"data": "digits", "more": "said"})
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["batch"] for r in rows] == ["4", "8", "16", "32"]
    assert rows[0]["older"] == "yes" and rows[1]["older"] == "" and rows[1]["more"] == "" and rows[2]["more"] == "said"
    assert rows[3]["ms"] == "2.5" and rows[2]["ms"] == "" and rows[3]["torch"] == torch.__version__
    assert all(row["measured"] for row in rows[1:]) and [file.name for file in tmp_path.iterdir()] == ["bench.csv"]
