"""Facts about the machine of a measurement, and the files that keep both."""

import csv
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dynanet.core.files import write_csv


def facts() -> dict[str, str]:
    """Return device, cores, versions, load and commit: the columns that make a row of results traceable."""
    return {
        "device": _processor(),
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.2f}",
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "dynanet": _version("dynanet"),
        "commit": _commit(),
    }


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Append rows to a CSV file, each with `about`, `facts` and the time. Folders are created."""
    more = {**about, **facts(), "measured": time.strftime("%Y-%m-%d %H:%M")}
    known: list[Mapping[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            known = list(csv.DictReader(file))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, [*known, *({**row, **more} for row in rows)])


def _processor() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        widest = "avx512" if "avx512f" in Path("/proc/cpuinfo").read_text() else "avx2"
        return f"{names[0].split(':')[1].strip()} ({widest})"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit of the package's checkout, + for uncommitted changes; empty for an installed package."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        run = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=5, check=True)
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", str(here))
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""
