"""A folder imports only from lower floors, never from a sibling: that is why a new mechanism is one file."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dynanet"
FLOORS = (  # from the ground up; `compress`, `search` and `serve` have their rooms reserved
    ("core",),
    ("ops",),
    ("gates", "nets", "data"),
    ("mechanisms", "train", "calibrate", "session", "export", "compress"),
    ("generate", "tasks", "report", "zoo", "testing"),
    ("bench", "datamodules", "search", "serve"),
    ("experiment",),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR = {place: floor for floor, places in enumerate(FLOORS) for place in places}
MOST_ARROWS = 90
NAMELESS = {"utils", "common", "helpers", "base", "misc", "manager", "registry"}


def place(path):
    """The folder or top-level file that a module belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree):
    """Names of dynanet's own folders and files that a module imports, type-checking imports aside."""
    skipped = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for n in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dynanet":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("dynanet.")]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = place(path)
    for other in imported(ast.parse(path.read_text())):
        if other != here and other in FLOOR:
            assert FLOOR[other] < FLOOR[here], f"{path.name} ({here}) imports {other}, which is not on a lower floor"


@pytest.mark.parametrize("folder", ["cli", "datamodules", "experiment", "tasks"])
def test_the_application_names_no_mechanism(folder):
    """Layers say what they need of training, calibration and reports, so a new mechanism touches its own file only."""
    for path in (PACKAGE / folder).rglob("*.py"):
        assert "mechanisms" not in imported(ast.parse(path.read_text())), path


def test_every_place_has_a_floor():
    unknown = {place(path) for path in PACKAGE.rglob("*.py")} - FLOOR.keys()
    assert not unknown, f"give {unknown} a floor"


def test_few_floors_and_few_arrows():
    """An arrow is a folder that imports from another one. Upward and sideways ones are refused above."""
    arrows = {(place(path), other) for path in PACKAGE.rglob("*.py") for other in imported(ast.parse(path.read_text()))}
    arrows = {(here, other) for here, other in arrows if here != other and other in FLOOR}
    assert len(FLOORS) <= 9 and len(arrows) <= MOST_ARROWS


def test_no_drawer_for_odds_and_ends():
    assert not {p.stem for p in PACKAGE.rglob("*")} & NAMELESS


def test_every_mechanism_has_its_card():
    mechanisms = {p.stem for p in (PACKAGE / "mechanisms").glob("*.py")} - {"__init__"}
    assert mechanisms == {p.stem for p in (PACKAGE / "mechanisms" / "cards").glob("*.md")}


def test_tests_mirror_files():
    """Nine of ten files have a test file of their name, so that it is found."""
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.rglob("test_*.py")}
    stems = [path.stem for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__")]
    without = sorted(stem for stem in stems if stem not in tests)
    assert len(without) <= 0.1 * len(stems), without
