"""The shape of the code and its words. `python tests/test_style.py [FOLDER]` lists what to mend."""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dynanet"
MOST_LINES = 400
MOST_FUNCTION_LINES = 60
MOST_TARGETS = 2
# Each is said plainly elsewhere: requested, most expensive, random, none, log, again, equal, more likely.
WORDS = re.compile(
    r"\b(asked|dearest|by lot|nobody|everybody|so many|anew|alike|likelier|whoever|is no(?! longer| more| less)"
    r"|are no(?! longer| more| less)|the door|told|heard|bettered|at home|come home|goes home|puts? the answer home"
    r"|lets? go|wants? nothing|stands? still|as it was|likes? to|torn|makes? do)\b",
    re.IGNORECASE,
)

Finding = tuple[int, str]


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def long_files(text: str) -> Iterator[Finding]:
    """Files of more than 400 lines."""
    if (lines := text.count("\n")) > MOST_LINES:
        yield 1, f"{lines} lines"


def long_functions(text: str) -> Iterator[Finding]:
    """Functions of more than 60 lines, docstring left out."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _body(node) > MOST_FUNCTION_LINES:
            yield node.lineno, f"{node.name} has {_body(node)} lines"


def _targets(target: ast.expr) -> Iterator[ast.expr]:
    """The single targets of `a, (b, c)`."""
    if isinstance(target, ast.Tuple | ast.List):
        for each in target.elts:
            yield from _targets(each)
    else:
        yield target


def parallel_assignments(text: str) -> Iterator[Finding]:
    """`a, b, c = x, y, z`: more than two targets at once. Unpacking one value is not meant."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple | ast.List):
            names = [sum(isinstance(n, ast.Name | ast.Attribute) for n in _targets(t)) for t in node.targets]
            if max(names) > MOST_TARGETS:
                yield node.lineno, "parallel assignment of more than two targets"


def nested_conditionals(text: str) -> Iterator[Finding]:
    """`a if x else b if y else c`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.IfExp) and any(isinstance(n, ast.IfExp) for n in (node.body, node.test, node.orelse)):
            yield node.lineno, "nested conditional expression"


def undocumented(text: str) -> Iterator[Finding]:
    """Public functions, methods and classes without a docstring, also where ruff was told to look away."""

    def visit(body: list[ast.stmt]) -> Iterator[Finding]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
                "_"
            ):
                if ast.get_docstring(node) is None:
                    yield node.lineno, f"{node.name} has no docstring"
                if isinstance(node, ast.ClassDef):
                    yield from visit(node.body)

    yield from visit(ast.parse(text).body)


def old_words(text: str) -> Iterator[Finding]:
    """Words that make a reader translate, in docstrings, comments and messages."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            for found in WORDS.finditer(token.string):
                yield token.start[0] + token.string[: found.start()].count("\n"), f"the word {found[0]!r}"


CHECKS = (long_files, long_functions, parallel_assignments, nested_conditionals, undocumented, old_words)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_style(check):
    found = {_name(path): places for path in _sources() if (places := list(check(path.read_text())))}
    assert not found, check.__doc__


def _classes() -> dict[str, list[ast.ClassDef]]:
    """By name: several files may have a `Block` of their own."""
    found: dict[str, list[ast.ClassDef]] = {}
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


def test_classes_are_abstract_or_final():
    """A class that another one derives from leaves an abstract method open, or is an error."""
    classes = _classes()

    def bases(node: ast.ClassDef) -> list[str]:
        return [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]

    def is_error(name: str) -> bool:
        if name in ("Exception", "ValueError", "Warning"):
            return True
        return any(is_error(base) for node in classes.get(name, ()) for base in bases(node))

    def left_open(node: ast.ClassDef) -> set[str]:
        """Abstract methods that a class has or inherits, and does not implement."""
        methods = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
        abstract = {m.name for m in methods if any("abstractmethod" in ast.unparse(d) for d in m.decorator_list)}
        inherited = {"ABC"} if "ABC" in bases(node) else set()
        for base in bases(node):
            inherited |= {method for each in classes.get(base, ()) for method in left_open(each)}
        return abstract | (inherited - {m.name for m in methods})

    derived_from = {base for nodes in classes.values() for node in nodes for base in bases(node) if base in classes}
    concrete = {name for name in derived_from if not is_error(name) and not all(map(left_open, classes[name]))}
    assert concrete == {"Dynamic"}, "its `forward` is each mechanism's own, with arguments of its own"


def test_no_function_hides_a_module():
    """`from dynanet.calibrate import x` is the same thing whether or not `dynanet.calibrate.x` was imported before."""
    for init in sorted(PACKAGE.rglob("__init__.py")):
        modules = {path.stem for path in init.parent.glob("*.py")} | {path.name for path in init.parent.iterdir()}
        tree = ast.parse(init.read_text())
        handed_on = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        if init.parent == PACKAGE:
            continue  # here the names are the modules
        assert not modules & (handed_on | strings), _name(init)


if __name__ == "__main__":
    start = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PACKAGE
    totals: Counter[str] = Counter()
    for path in [start] if start.is_file() else sorted(start.rglob("*.py")):
        for check in CHECKS:
            for line, what in check(path.read_text()):
                totals[check.__name__] += 1
                print(f"{_name(path)}:{line}: {what}")
    print(dict(totals))
