"""The model card of a bundle: description, loading, results, cost, data and licence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from dynanet.export.config import CONFIG, Inputs

_FEW = 4  # up to this many channels have their mean and standard deviation on the card


@dataclass(frozen=True)
class Card:
    """The author's part of a model card. Empty entries are shown as not given.

    Attributes:
        summary: one paragraph on intended use and limits.
        results: rows of a table, all with the same columns; put the split and the unit in the column's name:
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
        card: the author's part.
        architecture: the name of the model's function in the zoo.
        arguments: of that function.
        facts: properties of the model (parameters, MACs, input) by name, one line each. None is shown as not given; an
            empty mapping gets no line.
    """
    stated = {name: _in_words(value) for name, value in facts.items() if value != {}}
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


def _in_words(value: object) -> str:
    if value is None:
        return "not given"
    if isinstance(value, Inputs):
        return _inputs(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{_in_words(each)} ({name or 'the model itself'})" for name, each in value.items())
    return _figure(value)


def _inputs(inputs: Inputs) -> str:
    """The input format as text: "1 channel, 8 x 8 pixels, minus 0.33, divided by 0.38"."""
    said = [f"{inputs.channels:,} channel{'s' if inputs.channels > 1 else ''}"]
    said.append("{} x {} pixels".format(*inputs.size) if inputs.size is not None else "any size")
    many = inputs.channels > _FEW
    for verb, values in (("minus", inputs.mean), ("divided by", inputs.std)):
        if values is not None:
            numbers = ", ".join(f"{each:.4g}" for each in values)
            said.append(f"{verb} one number per channel (in {CONFIG})" if many else f"{verb} {numbers}")
    if inputs.mean is None and inputs.std is None:
        said.append("not normalised")
    if inputs.rate is not None:
        said.append(f"from sounds of {inputs.rate:,} samples per second")
    return ", ".join(said)


def _figure(value: object) -> str:
    """A number with four significant digits, all before the decimal point, and separators from 10,000 on."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return str(value)
    if not isinstance(value, Integral):
        number = float(value)
        if not 1000 <= abs(number) < 1e15:
            return f"{number:.4g}"
        value = round(number)
    return f"{int(value):,}" if abs(int(value)) >= 10_000 else str(int(value))  # a year has no comma


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)] + [[row.get(column, "") for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(_figure(value).split()).replace("|", "\\|")
