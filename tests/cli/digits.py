"""A small experiment as options, and what a folder holds."""

from pathlib import Path

MODEL = "--model.arguments={widths: [4, 8], depths: [1, 1], context: 4}"
DIGITS = ["--data.name", "digits", "--model.name", "staged_resnet", MODEL, "--recipe.epochs", "1"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What they do
