"""Image classification from parquet files in the Hugging Face hub's schema: a column of images, a column of labels.

An image is a struct {bytes, path} (or plain bytes) in the column `img` or `image`, a label an integer. Class names are
read from the schema's `huggingface` metadata where a file has it (https://huggingface.co/docs/datasets, "Image" and
"ClassLabel"). Files are found by the hub's naming of splits, alone or in folders:

    train-00000-of-00001.parquet    data/test-00000-of-00001.parquet    my-set_train.parquet    validation/0000.parquet

A file that names no split belongs to "train". A row group is read on access to one of its rows, and the last 1 GiB of
them is kept: sequential reading is cheap for any set, random reading only where the set fits.
"""

import json
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynanet.core.errors import DataError, MissingSplitError, require
from dynanet.data.images import Images, Transform, name_classes, to_float
from dynanet.data.splits import SAME_SPLIT, synonyms

HUB = "hf://datasets/"
IMAGE_COLUMNS = ("image", "img")
KEPT_BYTES = 2**30


def load_parquet(
    place: str | Path,
    split: str = "train",
    *,
    image: str | None = None,
    label: str = "label",
    classes: Sequence[str] | int | None = None,
    mode: str = "RGB",
    size: tuple[int, int] | None = None,
    transform: Transform = to_float,
) -> Images:
    """The images of a split, decoded on access; `.to_memory()` decodes them once (CIFAR-10: a few seconds).

    Args:
        place: a folder, a parquet file, or `hf://datasets/owner/name[@revision][/folder]`: a dataset of the Hugging
            Face hub, downloaded into its cache, and read from there without a network.
        split: "train", "val", "test", or another name that the files have; "val" also finds "validation", and so on.
        image: the column of images; None for `image` or `img`.
        label: the column of integer labels, say "fine_label".
        classes: number or names of the classes that you expect; None for any.
        mode: "RGB" or "L".
        size: (H, W) to resize to, after a central crop to that aspect.
        transform: applied to every image, uint8 (C, H, W).

    Raises:
        DataError: no such folder or dataset, no parquet files in it, no such split, missing shards, a file that is not
            parquet, a missing column, labels that are not integers, or other classes than expected.
        MissingExtraError: pyarrow is not installed (or huggingface_hub, for `hf://`).
    """
    home = _download(str(place), split) if str(place).startswith(HUB) else Path(place)
    files = [_Shard(path) for path in find_split(home, split)]
    image = image or _image_column(files[0])
    for file in files:
        file.check_image(image)
    labels = torch.cat([file.labels(label) for file in files])
    if not len(labels):
        raise DataError(f"split {split!r} of {home} has no rows; expected at least one image")
    names = name_classes(labels, files[0].class_names(label), classes)
    return Images(_Rows(files, image), labels, names, mode=mode, size=size, transform=transform)


def find_split(home: Path, split: str) -> list[Path]:
    """The parquet files of a split, in the order of their shards.

    Args:
        home: a folder, searched to any depth, or one file.
        split: the split's name; its synonyms are tried in turn.

    Raises:
        DataError: no parquet files, no such split, several datasets that have it, or missing shards.
    """
    try:
        top = home.parent if home.is_file() else home
        os.listdir(top)
    except OSError as error:
        hint = f" (for the hub's dataset write {HUB}{home})" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(home)) else ""
        raise DataError(f"cannot read {home} ({error.strerror}); expected a folder with parquet files{hint}") from error
    files = [home] if home.is_file() else sorted(path for path in home.rglob("*.parquet") if path.is_file())
    if not files:
        raise DataError(f"{home} has no parquet files; expected say train-00000-of-00001.parquet in it")
    named = [(path, _words(path.relative_to(top))) for path in files]
    for name in synonyms(split):
        chosen = [path for path, words in named if name in words]
        if not chosen and name == "train":
            others = {other for family in SAME_SPLIT for other in family}
            chosen = [path for path, words in named if not others & words]
        if chosen:
            return _whole(chosen, split, top)
    listed = ", ".join(str(path.relative_to(top)) for path in files[:8]) + (", ..." if len(files) > 8 else "")
    raise MissingSplitError(f"{home} has no split {split!r}; its files are {listed}")


class _Shard:
    """One parquet file: its footer is read at construction, its row groups on access. Damage is a DataError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path):
            file = require("pyarrow.parquet", "images").ParquetFile(path)
            self.footer, self.schema = file.metadata, file.schema_arrow
        counts = [self.footer.row_group(group).num_rows for group in range(self.footer.num_row_groups)]
        self.starts = [0, *accumulate(counts)]

    def check_image(self, column: str) -> None:
        arrow = require("pyarrow", "images")
        kind = self._kind(column)
        if arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)):
            raise DataError(f"column {column!r} of {self.path} is {kind}; expected a struct {{bytes, path}} or bytes")

    def labels(self, column: str) -> Tensor:
        """(rows,) int64."""
        kind = self._kind(column)
        if not require("pyarrow", "images").types.is_integer(kind):
            raise DataError(f"column {column!r} of {self.path} is {kind}; expected integer class numbers")
        values = self._read(range(self.footer.num_row_groups), column)
        if values.null_count:
            raise DataError(f"column {column!r} of {self.path} lacks {values.null_count} labels; expected one per row")
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).astype(np.int64))

    def class_names(self, column: str) -> list[str] | None:
        """From the schema's metadata; None if they are missing or in an unknown form."""
        try:
            written = json.loads((self.schema.metadata or {}).get(b"huggingface", b"null"))
            names = written["info"]["features"][column]["names"]
        except (ValueError, KeyError, TypeError):
            return None
        return [str(name) for name in names] if isinstance(names, list) and names else None

    def images(self, group: int, column: str) -> Any:
        """An arrow array of a row group's undecoded images."""
        values = self._read([group], column)
        return values.field("bytes") if require("pyarrow", "images").types.is_struct(values.type) else values

    def _kind(self, column: str) -> Any:
        if column not in self.schema.names:
            raise DataError(f"{self.path} has no column {column!r}; it has {', '.join(self.schema.names)}")
        return self.schema.field(column).type

    def _read(self, groups: Sequence[int], column: str) -> Any:
        with _reading(self.path):
            # Opened each time, since an open file survives neither pickling nor two forks; the footer is not reread.
            opened = require("pyarrow.parquet", "images").ParquetFile(self.path, metadata=self.footer, memory_map=True)
            # One thread, because this may be a forked worker.
            chunks = opened.read_row_groups(list(groups), columns=[column], use_threads=False).column(0)
            return chunks.combine_chunks()


class _Rows:
    """The undecoded images of some shards, one after the other."""

    def __init__(self, shards: Sequence[_Shard], column: str) -> None:
        self._shards = list(shards)
        self._column = column
        self._starts = [0, *accumulate(shard.starts[-1] for shard in shards)]
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}

    def read(self, row: int) -> bytes:
        shard, row = self._locate(row)
        group = bisect_right(self._shards[shard].starts, row) - 1
        content = self._group(shard, group)[row - self._shards[shard].starts[group]].as_py()
        if content is None:
            raise OSError("the row has no bytes")
        return content

    def name(self, row: int) -> str:
        shard, row = self._locate(row)
        return f"{self._shards[shard].path} row {row}"

    def _locate(self, row: int) -> tuple[int, int]:
        shard = bisect_right(self._starts, row) - 1
        return shard, row - self._starts[shard]

    def _group(self, shard: int, group: int) -> Any:
        if (shard, group) not in self._kept:
            self._kept[shard, group] = self._shards[shard].images(group, self._column)
            while len(self._kept) > 1 and sum(array.nbytes for array in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end((shard, group))
        return self._kept[shard, group]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns errors while reading a file into a DataError that names it."""
    try:
        yield
    except (OSError, require("pyarrow", "images").ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as parquet ({reason}); repair it or fetch it again") from error


def _image_column(shard: _Shard) -> str:
    for column in IMAGE_COLUMNS:
        if column in shard.schema.names:
            return column
    raise DataError(
        f"{shard.path} has no column {' or '.join(IMAGE_COLUMNS)}; it has {', '.join(shard.schema.names)}: give image="
    )


def _words(path: Path) -> set[str]:
    """data/my-set_train-00000-of-00001.parquet -> {data, my, set, train, 00000, ...}."""
    return set(re.split(r"[^a-z0-9]+", str(path.with_suffix("")).lower()))


def _whole(files: list[Path], split: str, top: Path) -> list[Path]:
    """The files, after checking that they are one whole dataset."""
    folders = sorted({str(path.parent.relative_to(top)) for path in files})
    if len(folders) > 1:
        raise DataError(f"split {split!r} is in several folders of {top}: {', '.join(folders)}; give one of them")
    counts = {int(of.group(1)) for path in files if (of := re.search(r"-of-(\d+)$", path.stem))}
    if counts and counts != {len(files)}:
        expected = " or ".join(map(str, sorted(counts)))
        raise DataError(
            f"split {split!r} of {top} has {len(files)} files and their names say {expected}; fetch the rest"
        )
    return files


def _download(url: str, split: str) -> Path:
    """The folder of a hub dataset's parquet files of one split in the local cache, fetched where possible."""
    hub = require("huggingface_hub", "hf")
    owner, _, rest = url.removeprefix(HUB).strip("/").partition("/")
    name, _, folder = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise DataError(f"{url} does not name a dataset; expected {HUB}owner/name")
    try:
        home = hub.snapshot_download(
            f"{owner}/{name}",
            repo_type="dataset",
            revision=revision or None,
            allow_patterns=[f"{folder}*{word}*.parquet" for word in synonyms(split)],
        )
    except Exception as error:  # the hub's errors, its HTTP client's, and ours of the network: many types, one meaning
        reason = " ".join(str(error).split())
        raise DataError(
            f"cannot fetch {url} from the hub ({type(error).__name__}: {reason}); "
            f"check the name and the network, or give a local folder"
        ) from error
    return Path(home) / folder
