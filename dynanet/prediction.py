"""Answers of a saved model for files: arrays and images."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import record
from dynanet.core.errors import InputError, require
from dynanet.core.files import write_atomically
from dynanet.export.bundle import Bundle
from dynanet.infer.session import Session
from dynanet.loading import read

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def predict(model: Path, inputs: Path) -> list[dict[str, Any]]:
    """Classify the inputs of a file or folder.

    Args:
        model: a bundle, or a run that holds one in model/.
        inputs: an .npy file, (C, H, W) or (N, C, H, W), as the model takes it; an image file; a folder of images.

    Returns:
        One row per input: input, class, index, probability, exit (from 1), macs.

    Raises:
        BundleError: the model cannot be loaded.
        InputError: inputs that cannot be read, or that the model cannot take.
    """
    bundle = read(model / "model" if (model / "config.yaml").exists() else model)
    x, names = _read_inputs(inputs, bundle)
    session = Session(bundle.model, x, batches=(64,), engines="eager" if len(x) < 64 else "fastest")
    cost = CostModel(bundle.model, x[:1])
    rows: list[dict[str, Any]] = []
    for group in x.split(256):
        with record(session) as trace:
            logits = session(group)
        spent = cost.spent(trace).tolist() if trace.calls else [cost.full] * len(group)
        exits = (
            sum((keep[:, 0] for keep in trace[""]), torch.zeros(len(group))) if trace.calls else torch.zeros(len(group))
        )
        chance, index = logits.softmax(-1).max(-1)
        for i in range(len(group)):
            number = int(index[i])
            rows.append(
                {
                    "input": names[len(rows)],
                    "class": bundle.classes[number] if bundle.classes else str(number),
                    "index": number,
                    "probability": round(float(chance[i]), 6),
                    "exit": int(exits[i]) + 1,
                    "macs": spent[i],
                }
            )
    return rows


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["input"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _read_inputs(place: Path, bundle: Bundle) -> tuple[Tensor, list[str]]:
    if place.suffix == ".npy":
        x = _array(place, bundle)
        return x, [str(i) for i in range(len(x))]
    if place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.suffix.lower() in PICTURES)
    else:
        files = [place] if place.suffix.lower() in PICTURES else []
    if not files:
        raise InputError(
            f"{place} holds no inputs; expected an .npy file, an image ({', '.join(PICTURES)}) or a folder"
        )
    return torch.stack([_picture(file, bundle) for file in files]), [str(f) for f in files]


def _array(place: Path, bundle: Bundle) -> Tensor:
    try:
        array = np.load(place, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{place} cannot be read as an .npy array ({error}); save it with numpy.save") from error
    if array.dtype.kind not in "fiu" or array.ndim not in (3, 4):
        raise InputError(
            f"{place} holds {array.dtype} of shape {array.shape}; expected numbers (N, C, H, W) or (C, H, W)"
        )
    x = torch.from_numpy(array.astype(np.float32))
    x = x[None] if x.dim() == 3 else x
    wanted = bundle.inputs
    if wanted is not None and (x.shape[1] != wanted.channels or wanted.size not in (None, tuple(x.shape[2:]))):
        raise InputError(
            f"{place} holds inputs of {tuple(x.shape[1:])}; the model takes {wanted.channels} channels of {wanted.size}"
        )
    if not torch.isfinite(x).all():
        raise InputError(f"{place} holds NaN or infinite values; mend or leave out those inputs")
    return x


def _picture(file: Path, bundle: Bundle) -> Tensor:
    wanted = bundle.inputs
    if wanted is None or wanted.channels not in (1, 3) or wanted.size is None:
        raise InputError(f"{file} is an image, but the model does not say that it takes images; give an .npy file")
    pil = require("PIL.Image", "images")
    try:
        with pil.open(file) as image:
            image = image.convert("RGB" if wanted.channels == 3 else "L").resize(wanted.size[::-1])
            pixels = torch.from_numpy(np.array(image, np.float32)) / 255
    except OSError as error:
        raise InputError(f"{file} cannot be read as an image ({error})") from error
    x = pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels[None]
    if wanted.mean is not None and wanted.std is not None:
        x = (x - torch.tensor(wanted.mean)[:, None, None]) / torch.tensor(wanted.std)[:, None, None]
    return x
