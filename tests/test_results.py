"""What the documents say of results is what the rows say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_documents_say_what_the_rows_say():
    done = subprocess.run([sys.executable, ROOT / "recipes" / "results.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_recipes_can_be_read():
    names = [path.stem for path in sorted((ROOT / "recipes").glob("*.py"))]
    done = subprocess.run(
        [sys.executable, "-c", f"import importlib\nfor name in {names}: importlib.import_module(name)"],
        capture_output=True, text=True, cwd=ROOT / "recipes",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
