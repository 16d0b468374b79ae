"""The model card of a bundle: what the model is, how to load it, what it reaches and costs, where it comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What only the maker of a model knows. What is not given is stated as not given.

    Attributes:
        summary: one paragraph on what the model is for, and what it is not for.
        results: rows of a table, all with the same columns; say the split and the unit in the column's name:
            `[{"budget (MACs)": 1.2e7, "test accuracy (%)": 91.3}, ...]`.
        data: the data set, its split and its licence.
        licence: the licence of the weights.
        citation: BibTeX.
    """

    summary: str = ""
    results: Sequence[Mapping[str, object]] = ()
    data: str = ""
    licence: str = ""
    citation: str = ""


def render(card: Card, architecture: str, arguments: Mapping[str, object], facts: Mapping[str, object]) -> str:
    """The card as Markdown.

    Args:
        card: the maker's words and figures.
        architecture: the name of the model's function in the zoo.
        arguments: what that function was given.
        facts: what can be read off the model (parameters, MACs, input): name and value, a line each; None is not given.
    """
    stated = {name: "not given" if value is None else value for name, value in facts.items()}
    call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    sections = {
        f"# {architecture}": card.summary or "A dynamic neural network: it computes less for easy inputs.",
        "## Load": '```python\nimport dynanet\n\nmodel = dynanet.load("path/to/this/folder")\n```',
        "## Model": "\n".join(
            [f"- built by: `{architecture}({call})`"] + [f"- {name}: {value}" for name, value in stated.items()]
        ),
        "## Results": _table(card.results) or "not given",
        "## Data": card.data or "not given",
        "## Licence": card.licence or "not given",
        "## Citation": f"```bibtex\n{card.citation.strip()}\n```" if card.citation else "not given",
    }
    front = "---\nlibrary_name: dynanet\n---\n"
    return front + "\n".join(f"{title}\n\n{text}\n" for title, text in sections.items())


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)] + [[row.get(column, "") for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
