"""Datasets of images with an annotation each: what the readers of label maps and of boxes share."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynanet.core.errors import DataError
from dynanet.data.images import ImageFiles, Images, to_float


class AnnotatedImages(Dataset[Any], ABC):
    """Images and an annotation for each, read from files.

    A row is `transform(image uint8 (C, H, W), annotation(row))`. A corrupt image is reported, and the next good image
    is returned in its place, with its own annotation.

    Args:
        images: labelled with their own row numbers, as `numbered` returns them.
        classes: the classes' names.
        transform: see above; what it draws must be the same for image and annotation.

    Attributes:
        images: as given.
        classes: the classes' names.
    """

    def __init__(self, images: Images, classes: Sequence[str], transform: Callable[[Tensor, Any], Any]) -> None:
        self.images = images
        self.classes = tuple(classes)
        self.transform = transform

    @abstractmethod
    def annotation(self, row: int) -> Any:
        """What belongs to the image of a row."""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, row = self.images[index]  # of a later row where this one is corrupt
        return self.transform(image, self.annotation(row))

    @property
    def corrupt(self) -> dict[str, str]:
        """Name -> reason, for every corrupt image found so far."""
        return self.images.corrupt

    def name(self, index: int) -> str:
        """The path of an image."""
        return self.images.name(index)


def numbered(paths: Sequence[Path], classes: Sequence[str], mode: str, size: tuple[int, int] | None = None) -> Images:
    """Images of these files, undecoded, uint8, with their row numbers as labels."""
    rows = torch.arange(len(paths))
    return Images(ImageFiles(paths), rows, classes, mode=mode, size=size, transform=_unchanged)


def list_files(folder: Path, suffixes: tuple[str, ...], expected: str) -> list[str]:
    """The names of a folder's files with these suffixes, sorted, without hidden ones.

    Raises:
        DataError: the folder cannot be read; the message ends with what was `expected`.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror}); expected {expected}") from error
    return [name for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]


def first_of(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list as text."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def float_image(image: Tensor, annotation: Any) -> tuple[Tensor, Any]:
    """The image as float32 in [0, 1] and its annotation: the default transform."""
    return to_float(image), annotation


def _unchanged(image: Tensor) -> Tensor:
    return image
