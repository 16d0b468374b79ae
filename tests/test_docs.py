"""What the documents show runs, and what they name exists."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from dynanet.cli.commands import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CARDS = sorted((ROOT / "dynanet" / "mechanisms" / "cards").glob("*.md"))
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


def names(path):
    """What a document names: targets of links, and code that looks like a path. Comments name nothing."""
    text = re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    links = {target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    spans = {span for span in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(r"[\w.-]*[\w]/[\w./-]*|\w+\.py", span)}
    return sorted(links - {""} | spans)


@pytest.mark.parametrize("path", [README, ROOT / "ARCHITECTURE.md", *CARDS], ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning's, see tests/train/conftest.py
def test_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNANET_CACHE", str(tmp_path / "cache"))
    shown = blocks(path, "python")
    assert shown, f"{path.name} shows no code"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in shown:
            exec(compile(block, path.name, "exec"), {"__name__": path.stem})


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_cards_have_the_same_headings(path):
    assert re.findall(r"^## (.*)$", path.read_text(), re.MULTILINE) == HEADINGS


@pytest.mark.parametrize("path", [README, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_what_is_named_exists(path):
    places = (ROOT, ROOT / "dynanet")  # ARCHITECTURE speaks of core/, not of dynanet/core/
    missing = [name for name in names(path) if not any((place / name).exists() for place in places)]
    assert not missing, f"{path.name} names {missing}, which do not exist"


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_commands_exist(words, monkeypatch, capsys):
    """Parsed as they stand, and not run; make's targets are looked up."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        return
    assert words[0] == "dynanet"
    with pytest.raises(SystemExit) as stop:
        main([*words[1:], "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`(?:[^`\n]* )?(--\w[\w-]*)", README.read_text()))))
def test_options_exist(option, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert option in capsys.readouterr().out


@pytest.mark.parametrize("path", [README, ROOT / "results" / "README.md", *CARDS], ids=str)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        assert link.startswith("http") or (path.parent / link).exists(), f"{path.name} links to {link}"
