"""Labelled images as torch datasets, and one policy for those that cannot be decoded.

Both datasets give pairs (image, label), the image float32 (C, H, W) in [0, 1] unless another `transform` is given:

- `Images` decodes a row when it is accessed. Any number of images, of any sizes (or of one: `size=`).
- `ImageTensors` holds one uint8 tensor (N, C, H, W). `Images.to_memory()` makes it, and training from it is fast.

A corrupt image is reported once by name, as a warning of the logger `dynanet.data`, and kept in `.corrupt`. `Images`
returns the next good row *of the same part* instead (image and label, so parts made by `splits.hold_out` stay
disjoint); `to_memory` leaves it out. More than 1 % corrupt images raise a `DataError` that lists them. Each DataLoader
worker keeps its own list.
"""

import io
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynanet.core.errors import DataError, check_choice, require
from dynanet.data.labels import count_classes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
TOLERATED = 0.01  # share of corrupt images above which reading fails
LISTED = 100  # names in an error message; the log has all of them

Transform = Callable[[Tensor], Any]

log = logging.getLogger("dynanet.data")


def to_float(image: Tensor) -> Tensor:
    """Convert uint8 in 0..255 of any shape to float32 in [0, 1]."""
    return image.to(torch.float32).div_(255)


class Encoded(Protocol):
    """Source of encoded images; picklable, for DataLoader workers."""

    def read(self, row: int) -> bytes:
        """The undecoded image; OSError if this one cannot be read, DataError if none can."""
        ...

    def name(self, row: int) -> str:
        """Where to find the image: a path, or a file and a row in it."""
        ...


class ImageFiles:
    """Encoded images by path."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = [str(path) for path in paths]

    def read(self, row: int) -> bytes:
        """The content of a file."""
        with open(self._paths[row], "rb") as file:
            return file.read()

    def name(self, row: int) -> str:
        """The path of a file."""
        return self._paths[row]


class Images(Dataset[tuple[Any, int]]):
    """Labelled images that are decoded on access.

    Args:
        source: gives the encoded images.
        labels: (N,) class of every row of the source.
        classes: the classes' names.
        mode: "RGB" for three channels, "L" for one.
        size: (H, W); other images are cropped centrally to this aspect and resized. None keeps their sizes; a batch
            needs images of one size.
        transform: applied to the decoded image, uint8 (C, H, W); may be one of torchvision's v2 transforms.
        rows: the rows of the source that belong to this part; None for all.

    Attributes:
        labels: (N,) int64, the class of every row.
        classes: the classes' names.
        corrupt: name -> reason, for the corrupt images of this part found so far.

    Raises:
        ConfigError: `mode` is neither "RGB" nor "L".
        DataError: no rows; on access, if more than 1 % of the images are corrupt.
    """

    def __init__(
        self,
        source: Encoded,
        labels: Tensor,
        classes: Sequence[str],
        *,
        mode: str = "RGB",
        size: tuple[int, int] | None = None,
        transform: Transform = to_float,
        rows: Tensor | None = None,
    ) -> None:
        check_choice("mode", mode, ("RGB", "L"))
        self._source = source
        self._mode = mode
        self._size = size
        self._all_labels = labels.to(torch.int64)
        self._rows = torch.arange(len(labels)) if rows is None else rows
        if not len(self._rows):
            raise DataError("no images here; expected at least one row")
        self.classes = tuple(classes)
        self.transform = transform
        self.labels = self._all_labels[self._rows]
        self.corrupt: dict[str, str] = {}
        self._corrupt_rows: set[int] = set()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        first = _checked(index, len(self))
        for step in range(len(self)):  # ends early: `_pixels` raises above 1 % corrupt
            candidate = (first + step) % len(self)
            pixels = self._pixels(candidate)
            if pixels is not None:
                return self.transform(torch.from_numpy(pixels.copy())), int(self.labels[candidate])
        raise AssertionError("every image is corrupt, and that is not more than 1 %")

    def name(self, index: int) -> str:
        """The path, or the file and row, of an image."""
        return self._source.name(int(self._rows[index]))

    def part(self, indices: Tensor, transform: Transform | None = None) -> "Images":
        """The images at these indices (fastest if ascending), with another transform if one is given."""
        return Images(
            self._source,
            self._all_labels,
            self.classes,
            mode=self._mode,
            size=self._size,
            transform=transform or self.transform,
            rows=self._rows[indices],
        )

    def to_memory(self) -> "ImageTensors":
        """Decode all images once; corrupt ones are left out and reported.

        Raises:
            DataError: the images differ in size (give `size=`), or more than 1 % are corrupt.
        """
        kept: list[int] = []
        images: np.ndarray | None = None
        for index in range(len(self)):
            pixels = self._pixels(index)
            if pixels is None:
                continue
            if images is None:
                images = np.empty((len(self), *pixels.shape), np.uint8)
            if pixels.shape != images.shape[1:]:
                h, w = pixels.shape[1:]
                first_h, first_w = images.shape[2:]
                raise DataError(
                    f"{self.name(index)} is {h} x {w} and {self.name(kept[0])} is {first_h} x {first_w}; images in one "
                    f"tensor must have one size: give size=(height, width)"
                )
            images[len(kept)] = pixels
            kept.append(index)
        assert images is not None, "at most 1 % are corrupt, and there is at least one row"
        whole = torch.from_numpy(images[: len(kept)])
        loaded = ImageTensors(whole, self.labels[kept], self.classes, transform=self.transform)
        loaded.corrupt = dict(self.corrupt)
        return loaded

    def _pixels(self, index: int) -> np.ndarray | None:
        """Uint8 (C, H, W), a view that may be read-only, or None if corrupt."""
        row = int(self._rows[index])
        if row in self._corrupt_rows:
            self._stop_if_too_many()
            return None
        try:
            return _decode(self._source.read(row), self._mode, self._size)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # decoders meet garbage with OSError, SyntaxError, ValueError, struct.error, ...
            # Pillow names the buffer it read from, which does not help.
            reason = re.sub(r"cannot identify image file <.*>", "no image file of a known kind", str(error))
            self._report(row, " ".join(reason.split()) or type(error).__name__)
            return None

    def _report(self, row: int, reason: str) -> None:
        name = self._source.name(row)
        self._corrupt_rows.add(row)
        self.corrupt[name] = reason
        log.warning("corrupt image: %s (%s)", name, reason)
        self._stop_if_too_many()

    def _stop_if_too_many(self) -> None:
        if len(self.corrupt) > TOLERATED * len(self):
            listed = "; ".join(f"{name} ({reason})" for name, reason in list(self.corrupt.items())[:LISTED])
            more = f"; and {len(self.corrupt) - LISTED} more, see the log" if len(self.corrupt) > LISTED else ""
            raise DataError(
                f"{len(self.corrupt)} of {len(self)} images found corrupt so far, more than {TOLERATED:.0%}; "
                f"mend or remove: {listed}{more}"
            )


class ImageTensors(Dataset[tuple[Any, int]]):
    """Labelled images in memory.

    Args:
        images: uint8 (N, C, H, W).
        labels: (N,) class of every image.
        classes: the classes' names.
        transform: applied to one image, uint8 (C, H, W).

    Attributes:
        images: uint8 (N, C, H, W), not transformed.
        labels: (N,) int64.
        classes: the classes' names.
        corrupt: name -> reason, for every image that was left out.

    Raises:
        DataError: images and labels do not fit together, or there are none.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str], *, transform: Transform = to_float
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or labels.shape != images.shape[:1] or not len(images):
            raise DataError(
                f"images {tuple(images.shape)} {images.dtype} with labels {tuple(labels.shape)}; "
                f"expected uint8 (N, C, H, W) with (N,), N > 0"
            )
        self.images = images
        self.labels = labels.to(torch.int64)
        self.classes = tuple(classes)
        self.transform = transform
        self.corrupt: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index = _checked(index, len(self))
        return self.transform(self.images[index]), int(self.labels[index])

    def part(self, indices: Tensor, transform: Transform | None = None) -> "ImageTensors":
        """A copy of the images at these indices, with another transform if one is given."""
        return ImageTensors(
            self.images[indices], self.labels[indices], self.classes, transform=transform or self.transform
        )


def name_classes(labels: Tensor, names: Sequence[str] | None, wanted: Sequence[str] | int | None) -> tuple[str, ...]:
    """The classes' names, after checking them against the labels and against what the caller expects.

    Args:
        labels: (N,).
        names: names in the data; None if it has none.
        wanted: number or names of the classes that the caller expects; None for any.

    Raises:
        DataError: they disagree.
    """
    if len(labels) and int(labels.min()) < 0:
        raise DataError(
            f"{int((labels < 0).sum())} of {len(labels)} rows have a negative label (unlabelled); "
            f"expected 0, 1, 2, ...: choose a labelled split"
        )
    met = int(labels.max()) + 1 if len(labels) else 0
    if names is None:
        count = count_classes(labels) if wanted is None else wanted
        names = [str(label) for label in range(count)] if isinstance(count, int) else count
    if isinstance(wanted, int) and wanted != len(names):
        raise DataError(f"the data has {len(names)} classes ({_some(names)}); expected {wanted}")
    if isinstance(wanted, Sequence) and list(wanted) != list(names):
        raise DataError(f"the data has the classes {_some(names)}; expected {_some(wanted)}, in this order")
    if met > len(names):
        raise DataError(f"label {met - 1} in data of {len(names)} classes; expected labels from 0 to {len(names) - 1}")
    return tuple(names)


def _decode(content: bytes, mode: str, size: tuple[int, int] | None) -> np.ndarray:
    """Image file -> uint8 (C, H, W)."""
    pil = require("PIL.Image", "images")
    ops = require("PIL.ImageOps", "images")
    with pil.open(io.BytesIO(content)) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode}: more than 8 bits per channel")
        if "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1:
            image = ops.exif_transpose(image)  # a photo stored rotated
        if "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns when a palette with transparency becomes RGB at once
        image = image.convert(mode)
        if size is not None and image.size != (size[1], size[0]):
            image = ops.fit(image, (size[1], size[0]), method=pil.Resampling.BILINEAR)
        return np.asarray(image).reshape(image.height, image.width, len(mode)).transpose(2, 0, 1)


def decoded_size(path: Path) -> tuple[int, int] | None:
    """(width, height) as decoded, from the header alone; None for a corrupt image, which is reported when read."""
    pil = require("PIL.Image", "images")
    try:
        with pil.open(path) as image:
            rotated = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if rotated else image.size
    except Exception:  # garbage raises almost anything
        return None


def _checked(index: int, length: int) -> int:
    if not -length <= index < length:
        raise IndexError(f"row {index} of {length}")
    return index % length


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


_ORIENTATION = 0x0112  # EXIF tag
