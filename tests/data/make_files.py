"""Tiny legal image files: PNG folders and parquet files in the Hugging Face hub's schema. PNG, so pixels survive.

A test file that imports this one skips where the extra `images` is not installed.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

GARBAGE = b"\x89PNG\r\n\x1a\n this is no image"


def noise(count: int, height: int = 6, width: int = 5, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random images, uint8 (N, H, W, C): no two alike, so an image tells which row it is."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    """(H, W, C) -> a PNG file, grey if C = 1."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


def write_folder(root: Path, images: np.ndarray, labels: list[int], classes: list[str]) -> list[Path]:
    """root/class/000.png; the paths in the order of the images."""
    paths = [root / classes[label] / f"{k:03d}.png" for k, label in enumerate(labels)]
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return paths


def write_parquet(
    path: Path,
    files: list[bytes | None],
    labels: list[int | None],
    *,
    image: str = "image",
    label: str = "label",
    classes: list[str] | None = None,
    group: int = 4,
) -> None:
    """A shard of encoded images, in row groups of `group`, with class names in the schema if given."""
    columns = {image: [{"bytes": file, "path": None} for file in files], label: labels}
    struct = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema({image: struct, label: pyarrow.int64()})
    if classes is not None:
        features = {image: {"_type": "Image"}, label: {"names": classes, "_type": "ClassLabel"}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns, schema), path, row_group_size=group)
