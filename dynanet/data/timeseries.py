"""Labelled time series of the UEA and UCR archives: files in the .ts format, read strictly.

The format, as timeseriesclassification.com documents it: comments begin with # or %, a header of lines "@key value",
the line "@data", then one series per line: dimensions separated by ":", values by ",", the class last. Dau et al.
2018, arXiv:1810.07758 (UCR); Bagnall et al. 2018, arXiv:1811.00075 (UEA).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynanet.core.errors import DataError
from dynanet.data.lines import read_lines
from dynanet.data.ragged import SequenceSet


def load_time_series(path: str | Path) -> SequenceSet:
    """Series (steps, dimensions) of equal or different lengths, and their classes in the header's order.

    Args:
        path: a .ts file: JapaneseVowels_TRAIN.ts, say. Both parts of a set name the same classes in the same order.

    Raises:
        DataError: no such file, no classes (regression), time stamps, missing values, dimensions of different lengths,
            or a line that contradicts the header.
    """
    lines = read_lines(path, "a time series file (.ts)")
    header, start = _header(lines, path)
    classes = _classes(header, path)
    if header.get("timestamps", ["false"]) != ["false"]:
        raise DataError(f"{path} has time stamps; expected values at even steps (@timeStamps false)")
    sequences = []
    labels = []
    for number, line in enumerate(lines[start:], start=start + 1):
        if _is_remark(line):
            continue
        *dimensions, label = line.strip().split(":")
        if not dimensions or label.strip() not in classes:
            raise DataError(f"line {number} of {path} ends in {label[:20]!r}; expected a class: {', '.join(classes)}")
        sequences.append(_series(dimensions, f"line {number} of {path}"))
        labels.append(classes.index(label.strip()))
    _as_announced(sequences, header, path)
    return SequenceSet(sequences, torch.tensor(labels), classes)


def _header(lines: Sequence[str], path: str | Path) -> tuple[dict[str, list[str]], int]:
    """The words after every key (in lower case), and the number of the first line of data, from 0."""
    header: dict[str, list[str]] = {}
    for number, line in enumerate(lines):
        words = line.split()
        if _is_remark(line):
            continue
        if not words[0].startswith("@"):
            raise DataError(f"line {number + 1} of {path} begins with {line[:20]!r}; expected @key, or @data first")
        if words[0].lower() == "@data":
            return header, number + 1
        header[words[0][1:].lower()] = [w.lower() for w in words[1:2]] + words[2:]
    raise DataError(f"{path} has no line @data; expected a time series file (.ts)")


def _is_remark(line: str) -> bool:
    """An empty line, or a comment."""
    return not line.strip() or line.lstrip().startswith(("#", "%"))


def _classes(header: dict[str, list[str]], path: str | Path) -> list[str]:
    first, *classes = header.get("classlabel", ["false"])
    if first != "true" or not classes or len(set(classes)) < len(classes):
        raise DataError(
            f"{path} has the class labels {classes if first == 'true' else 'none'}; expected a line such as "
            f"'@classLabel true 1 2' (a set for regression has none)"
        )
    return classes


def _series(dimensions: Sequence[str], where: str) -> Tensor:
    """(steps, dimensions)."""
    try:
        values = [np.array(d.split(","), dtype=np.float32) for d in dimensions]
    except ValueError as error:
        raise DataError(f"{where} holds a value that is not a number ({error}); fill in missing values") from error
    if len({len(v) for v in values}) > 1:
        raise DataError(f"{where} has dimensions of {[len(v) for v in values]} steps; expected the same in all")
    series = np.stack(values, 1)
    if not np.isfinite(series).all():
        raise DataError(f"{where} holds NaN or infinite values; fill them in, or remove the line")
    return torch.from_numpy(series)


def _as_announced(sequences: Sequence[Tensor], header: dict[str, list[str]], path: str | Path) -> None:
    if not sequences:
        raise DataError(f"{path} has no series behind @data; expected one per line")
    announced = {
        "dimensions": (header.get("dimensions", ["1"] if header.get("univariate") == ["true"] else []), 1),
        "seriesLength": (header.get("serieslength", []), 0),
    }
    for name, (words, axis) in announced.items():
        sizes = sorted({s.shape[axis] for s in sequences})
        if words and [str(size) for size in sizes] != words:
            raise DataError(f"{path} announces @{name} {words[0]} and its series have {sizes}; it is damaged")
    if header.get("equallength") == ["true"] and len({s.shape[0] for s in sequences}) > 1:
        raise DataError(f"{path} announces series of one length and has several; it is damaged")
