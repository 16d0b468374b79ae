"""What the documents say of results is what the rows say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_documents_say_what_the_rows_say():
    done = subprocess.run([sys.executable, ROOT / "recipes" / "results.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
