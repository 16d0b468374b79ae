"""Code in the documents runs, what they name exists, and their words are plain."""

import ast
import importlib
import json
import operator
import re
import shlex
from pathlib import Path

import pytest
import torch

import dynanet
from dynanet.cli.commands import main
from tests.test_floors import FLOOR, PACKAGE
from tests.test_style import WORDS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
RESULTS = ROOT / "results" / "README.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))
CARDS = sorted((ROOT / "dynanet" / "mechanisms" / "cards").glob("*.md"))
DOCUMENTS = [README, ARCHITECTURE, CONTRIBUTING, RESULTS, *GUIDES, *CARDS]
FILES = {"py", "md", "csv", "json", "yaml", "html", "txt", "toml"}
MOST_README_LINES = 120
MOST_CARD_LINES = 120  # written by hand: generated tables do not count
HEADINGS = [
    "What adapts",
    "How to use",
    "Suggested hyper-parameters",
    "What it gains and what it costs",
    "Differences from the paper",
    "Attribution",
]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def commands(path):
    """Every command of the bash blocks, as words."""
    lines = "\n".join(blocks(path, "bash")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def prose(path):
    """The text of a document without its code blocks, line for line."""
    return re.sub(r"^```.*?^```", lambda code: "\n" * code[0].count("\n"), path.read_text(), flags=re.DOTALL | re.M)


def spans(path):
    """What stands in inline code. Comments name nothing."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"<!--.*?-->", "", prose(path), flags=re.DOTALL))


def names(path):
    """What a document names: targets of links, and inline code that looks like a path."""
    text = re.sub(r"<!--.*?-->", "", prose(path), flags=re.DOTALL)
    links = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    return sorted(links - {""} | {span for span in spans(path) if re.fullmatch(r"[\w.-]*[\w]/[\w./-]*|\w+\.py", span)})


def dotted(path):
    """Every dotted name in inline code: `calibrate.calibrate`, and the `torch.tensor` of `torch.tensor(p).logit()`."""
    found = {name for span in spans(path) for name in re.findall(r"(?<![\w./-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", span)}
    return sorted(name for name in found if name.rsplit(".")[-1] not in FILES)


def exists(name):
    """Whether a dotted name is a module, or an attribute that can be reached, of dynanet or torch."""
    first, *rest = name.split(".")
    thing = {"dynanet": dynanet, "torch": torch, "nn": torch.nn}.get(first) or getattr(dynanet, first, None)
    for part in rest:
        if not hasattr(thing, part):
            try:
                importlib.import_module(f"{thing.__name__}.{part}")
            except (AttributeError, ModuleNotFoundError):
                return False
        thing = getattr(thing, part)
    return thing is not None


def assigned(path):
    """Names that the code of a document assigns: `model` of `model.active`."""
    nodes = [node for block in blocks(path, "python") for node in ast.walk(ast.parse(block))]
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the code of a document in an empty folder; answers the names it leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNANET_CACHE", str(tmp_path / "cache"))

    def of(path):
        left = {"__name__": path.stem}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for block in blocks(path, "python"):
                exec(compile(block, path.name, "exec"), left)
        return left

    return of


def test_readme_and_cards_show_code():
    for path in [README, ARCHITECTURE, *CARDS]:
        assert blocks(path, "python"), f"{path.name} shows no code"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path, "python")], ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning's, see tests/train/conftest.py
def test_code_runs(path, run):
    """And the attributes of its variables that the text names are there."""
    left = run(path)
    for name in dotted(path):
        first, *rest = name.split(".")
        if first in assigned(path) & left.keys():
            operator.attrgetter(".".join(rest))(left[first])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_dotted_names_exist(path):
    """A name in inline code is one of the package, or belongs to a variable of the document's own code."""
    missing = [name for name in dotted(path) if name.split(".")[0] not in assigned(path) and not exists(name)]
    assert not missing, f"{path.name} names {missing}, which do not exist"


def test_a_dotted_name_that_does_not_exist_is_found():
    assert exists("generate.generate") and exists("dynanet.nets") and exists("torch.nn.Linear")
    assert not exists("generate.nothing") and not exists("infer.generate") and not exists("zoo.no_such_network")


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_cards_have_the_same_headings(path):
    assert re.findall(r"^## (.*)$", path.read_text(), re.MULTILINE) == HEADINGS


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_cards_begin_with_a_verdict_and_are_short(path):
    title, empty, verdict = path.read_text().split("\n## ")[0].split("\n", 2)
    assert title.startswith("# ") and not empty
    assert re.match(r"Worth it when .*; not when .*\.", verdict.replace("\n", " ")), verdict
    by_hand = re.sub(r"<!-- results:.*?<!-- end of results -->\n", "", path.read_text(), flags=re.DOTALL)
    assert by_hand.count("\n") <= MOST_CARD_LINES


def test_floors_of_the_architecture_are_those_of_the_test():
    rows = re.findall(r"^\| (\d) \| (.*?) \|", ARCHITECTURE.read_text(), re.MULTILINE)
    shown = {name: int(floor) for floor, cell in rows for name in re.findall(r"`(\w+)/?`", cell)}
    there = {path.stem for path in PACKAGE.iterdir() if not path.stem.startswith("__")}
    assert shown == {name: floor for name, floor in FLOOR.items() if name in there}


def test_readme_is_short():
    assert README.read_text().count("\n") <= MOST_README_LINES


def test_every_card_is_in_the_readme_and_every_guide_too():
    for path in [*CARDS, *GUIDES]:
        assert f"({path.relative_to(ROOT).as_posix()})" in README.read_text(), path.name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_plain(path):
    """The words of `tests/test_style.py`, in text and in generated tables."""
    text = prose(path)
    found = [f"line {text[: word.start()].count(chr(10)) + 1}: {word[0]}" for word in WORDS.finditer(text)]
    assert not found, f"{path.name}: {found}"


@pytest.mark.parametrize("path", [README, ARCHITECTURE, CONTRIBUTING, *GUIDES], ids=lambda path: path.stem)
def test_what_is_named_exists(path):
    places = (path.parent, ROOT, ROOT / "dynanet")  # ARCHITECTURE speaks of core/, not of dynanet/core/
    missing = [name for name in names(path) if not any((place / name).exists() for place in places)]
    assert not missing, f"{path.name} names {missing}, which do not exist"


@pytest.mark.parametrize("words", [words for path in [README, *GUIDES] for words in commands(path)], ids=" ".join)
def test_commands_exist(words, monkeypatch, capsys):
    """Parsed and not run; the targets of make and the extras of pip are looked up."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        return
    if words[0] == "pip":
        extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert words[1:3] == ["install", "-e"] and not set(words[3][2:-1].split(",")) - set(extras)
        return
    assert words[0] == "dynanet"
    with pytest.raises(SystemExit) as stop:
        main([*words[1:], "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


def test_extras_of_the_readme_exist():
    named = re.findall(r"`(\w+)`", re.search(r"^Extras: .*?\n\n", README.read_text(), re.DOTALL | re.MULTILINE)[0])
    extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert named and not set(named) - set(extras)


@pytest.mark.parametrize(
    "option",
    sorted({o for path in [README, *GUIDES] for o in re.findall(r"`(?:[^`\n]* )?(--\w[\w-]*)", prose(path))}),
)
def test_options_exist(option, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert option in capsys.readouterr().out


@pytest.mark.parametrize("path", [README, RESULTS, *GUIDES, *CARDS], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    """Files exist, and so do the headings that a link points to."""
    for link, heading in re.findall(r"\]\(([^)#\s]+)(?:#([^)]*))?\)", path.read_text()):
        assert link.startswith("http") or (path.parent / link).exists(), f"{path.name} links to {link}"
        if heading and not link.startswith("http"):
            titles = re.findall(r"^#+ (.*)$", (path.parent / link).read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{path.name} links to {link}#{heading}"


def test_the_licence_files_exist():
    named = re.search(r"^license-files = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert named is not None
    assert [name for name in json.loads(named[1]) if (ROOT / name).is_file()] == ["LICENSE"]
