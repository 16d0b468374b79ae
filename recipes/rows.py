"""Rows of `results/`, and the forms in which tables show them."""

import csv
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def rows(name):
    path = ROOT / "results" / name
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def quiet(found):
    """Rows measured at a load of at most the number of cores; others stay in the file and are not shown."""
    return [row for row in found if float(row["load"]) <= float(row["cores"])]


def spread(found, column, form):
    """The median, and in brackets the lowest and the highest."""
    values = [float(row[column]) for row in found if row.get(column)]
    if not values:
        return "not measured"
    return f"{form(np.median(values))} ({form(min(values))} to {form(max(values))})"


PLAIN = {"likelier than not": "more likely than not", "exits drawn by lot": "random exits"}  # in rows: in tables


def plain(name):
    """The name of a row as tables show it."""
    for written, shown in PLAIN.items():
        name = name.replace(written, shown)
    return name


def percent(value):
    return f"{100 * value:.1f} %"


def times(value):
    return f"{value:.2f}"


def source(found, name):
    """Where rows come from: file, device, load, versions, commits."""
    if not found:
        return ""
    loads = [float(row["load"]) for row in found]
    commits = sorted({row["commit"] for row in found})
    return (
        f"[{name}](results/{name}): {found[0]['device']}, load average {min(loads):.1f} to {max(loads):.1f}, torch "
        f"{found[0]['torch']}, ONNX Runtime {found[0]['onnxruntime']}, commit {', '.join(commits)}."
    )
