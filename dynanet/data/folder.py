"""An image folder: `root/class name/*.png`, or `root/split/class name/*.png`; files may lie deeper.

Classes are the folders' names in alphabetical order, over all splits, so that a label means the same in each.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dynanet.core.errors import DataError, MissingSplitError
from dynanet.data.images import SUFFIXES, ImageFiles, Images, Transform, name_classes, to_float
from dynanet.data.splits import SAME_SPLIT, synonyms


def load_folder(
    root: str | Path,
    split: str | None = None,
    *,
    classes: Sequence[str] | int | None = None,
    mode: str = "RGB",
    size: tuple[int, int] | None = None,
    transform: Transform = to_float,
) -> Images:
    """The images of a folder, decoded on access; `.to_memory()` decodes them once.

    Args:
        root: the folder.
        split: the subfolder that holds the class folders ("val" also finds "validation", and so on); None if `root`
            itself holds them.
        classes: number or names of the classes that you expect; None for any.
        mode: "RGB" or "L".
        size: (H, W) to resize to, after a central crop to that aspect.
        transform: applied to every image, uint8 (C, H, W).

    Raises:
        DataError: the folder cannot be read, has no such split, no class folders, no images; a class without images;
            or other classes than expected.
    """
    home = Path(root)
    names = folders = _folders(home)
    if split is None:
        splits = [name for name in folders if _is_split(name) and _folders(home / name)]
        if splits:
            raise DataError(f"{home} seems to hold splits, not classes; give split=, one of {', '.join(splits)}")
    else:
        found = [name for name in synonyms(split) if name in folders]
        if not found:
            raise MissingSplitError(f"{home} has no split {split!r}; it has {', '.join(folders) or 'no subfolders'}")
        beside = [name for name in folders if _is_split(name)] if _is_split(found[0]) else folders
        names = sorted({inner for name in beside for inner in _folders(home / name)})
        home = home / found[0]
    files = {name: _images(home / name) if (home / name).is_dir() else [] for name in names}
    if not any(files.values()):
        raise DataError(f"{home} has no images in class folders; expected {home}/<class name>/<image>.png or the like")
    if split is None and not all(files.values()):
        empty = ", ".join(name for name in names if not files[name])
        raise DataError(f"{home} has class folders without images: {empty}; fill or remove them")
    labels = torch.tensor([label for label, name in enumerate(names) for _ in files[name]])
    paths = [path for name in names for path in files[name]]
    found_classes = name_classes(labels, names, classes)
    return Images(ImageFiles(paths), labels, found_classes, mode=mode, size=size, transform=transform)


def _is_split(name: str) -> bool:
    return any(name in family for family in SAME_SPLIT)


def _folders(folder: Path) -> list[str]:
    """The subfolders' names, sorted, without hidden ones."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror}); expected a folder of images") from error


def _images(folder: Path) -> list[str]:
    """Image files in a folder, sorted. A link that leads nowhere is listed, and reported as corrupt when read."""
    found: list[str] = []
    for place, inner, names in os.walk(folder, onerror=_unreadable):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [
            os.path.join(place, name) for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise DataError(f"cannot read the folder {error.filename} ({error.strerror}); check its permissions") from error
