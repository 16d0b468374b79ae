"""What a figure was measured on."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch


def facts() -> dict[str, str]:
    """Device, cores, versions, load and commit: the columns that make a row of results traceable."""
    return {
        "device": _processor(),
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.2f}",
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "dynanet": _version("dynanet"),
        "commit": _commit(),
    }


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
    """Of the checkout the package lies in; empty for an installed one. A trailing + marks uncommitted changes."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", str(here)],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("+" if changed else "")
