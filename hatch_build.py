"""The build hook: compiles the native kernels where a C compiler is there.

An install never fails for their sake: no compiler, a broken one, or a system they are not written for leave a package
that runs on torch alone.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("dynanet") / "ops" / "native"
# No -march: the instruction set is chosen at run time.
FLAGS = ["-O2", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread"]


class NativeKernels(BuildHookInterface):
    """Puts the compiled kernels into wheels, and beside their source in editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say what kind of wheel it is."""
        library, why = compiled(Path(self.root) / NATIVE)
        if library is None:
            self.app.display_warning(f"dynanet is installed without native kernels ({why}); it runs on torch alone")
            return
        build_data["artifacts"].append(f"/{(NATIVE / library.name).as_posix()}")
        build_data["pure_python"] = False
        # No code of Python's or torch's is called, so one wheel serves all versions of a platform.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compiled(folder: Path) -> tuple[Path | None, str]:
    """The library, compiled from the sources in a folder; or None, and why."""
    found = [path for path in map(shutil.which, ("cc", "gcc", "clang")) if path]
    compiler = shlex.split(os.environ.get("CC", "")) or found[:1]
    if os.name != "posix":
        return None, "they are not built on this system"
    if not compiler:
        return None, "there is no C compiler"
    target = folder / "kernels.so"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # one file system, so that the last step is one rename
        built = Path(scratch) / target.name
        source = [f'-DDYNANET_SOURCE="{digest(folder)}"', str(folder / "kernels.c")]
        command = [*compiler, *FLAGS, *source, "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.SubprocessError) as error:
            return None, f"the C compiler could not be run: {error}"
        if done.returncode or not built.exists():
            return None, f"the C compiler failed: {' '.join((done.stderr or done.stdout).split())[:300]}"
        built.replace(target)
    return target, ""


def digest(folder: Path) -> str:
    """Of the sources: the loader refuses a library that was compiled from others."""
    sources = sorted([*folder.glob("*.c"), *folder.glob("*.h")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:16]
