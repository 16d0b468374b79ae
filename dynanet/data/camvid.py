"""Segmentation in SegNet's layout: `root/train/x.png` has its labels in `root/trainannot/x.png`; so do val and test.

CamVid's road scenes come so (Brostow, Fauqueur, Cipolla: Semantic object classes in video, 2009; splits and the 11
classes of SegNet, https://arxiv.org/abs/1511.00561), and any other data in that layout can be read. A label map holds a
class per pixel; `VOID` marks pixels that belong to none: they train nothing and are not scored
(`cross_entropy(ignore_index=data.void)`).

Label maps are read and checked when the data is loaded, and stay in memory (one byte per pixel): a bad one is told
before training. Images are decoded when asked for; a corrupt one is reported by name, as `data.images` says.
"""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynanet.core.errors import DataError, MissingSplitError, require
from dynanet.data.folder import SUFFIXES
from dynanet.data.images import Images, to_float
from dynanet.data.splits import synonyms

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
VOID = 11

PairTransform = Callable[[Tensor, Tensor], Any]


def plain(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The image float32 in [0, 1], the labels as they are."""
    return to_float(image), labels


class LabelMaps(Dataset[Any]):
    """Images and a class per pixel; `load_camvid` makes it.

    A row is what `transform` makes of (image uint8 (C, H, W), labels int64 (H, W)); `plain` gives float32 in [0, 1]
    and the labels. A corrupt image is reported, and the next good pair answers in its place.

    Args:
        images: labelled with their own row numbers, and not transformed.
        maps: per image its labels, uint8 (H, W).
        classes: the classes' names.
        void: the label of pixels that belong to no class.
        transform: see above; what it draws must be the same for image and labels.

    Attributes:
        maps: per image its labels, uint8 (H, W).
        classes: the classes' names.
        void: the label to leave out of losses and scores.
    """

    def __init__(
        self, images: Images, maps: Sequence[Tensor], classes: Sequence[str], void: int, transform: PairTransform
    ) -> None:
        assert len(images) == len(maps), "one label map per image"
        self._images, self.maps = images, tuple(maps)
        self.classes, self.void, self.transform = tuple(classes), void, transform

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> Any:
        image, row = self._images[index]  # of a good one, which may be a later row
        return self.transform(image, self.maps[row].to(torch.int64))

    @property
    def corrupt(self) -> dict[str, str]:
        """Name -> reason, of every image found to be corrupt so far."""
        return self._images.corrupt

    def name(self, index: int) -> str:
        """The path of an image."""
        return self._images.name(index)


def load_camvid(
    root: str | Path,
    split: str,
    *,
    classes: Sequence[str] = CLASSES,
    void: int = VOID,
    mode: str = "RGB",
    size: tuple[int, int] | None = None,
    transform: PairTransform = plain,
) -> LabelMaps:
    """A split of CamVid, or of other data in SegNet's layout.

    Args:
        root: the folder that holds `train/`, `trainannot/`, ...
        split: the folder of the images ("val" also finds "validation", and so on).
        classes: the names of labels 0, 1, 2, ...
        void: the label of pixels that belong to none.
        mode: "RGB" or "L".
        size: (H, W) to resize to, after a central cut to that aspect; labels take the nearest pixel's.
        transform: gets every pair, uint8 (C, H, W) and int64 (H, W).

    Raises:
        DataError: a folder that cannot be read or is empty; images without label map, or the other way round; a label
            map that cannot be decoded, is no map of classes, has another size than its image, or labels that are
            neither a class nor void.
        MissingSplitError: no such split.
    """
    home = Path(root)
    found = [name for name in synonyms(split) if (home / name).is_dir()]
    if not found:
        there = sorted(p.name for p in home.iterdir() if p.is_dir()) if home.is_dir() else []
        raise MissingSplitError(f"{home} has no split {split!r}; it has {', '.join(there) or 'no subfolders'}")
    images, maps = _by_stem(home / found[0]), _by_stem(home / f"{found[0]}annot")
    if not images:
        raise DataError(f"{home / found[0]} has no images; expected files like 0001.png")
    if images.keys() != maps.keys():
        lone = sorted(images.keys() ^ maps.keys())
        raise DataError(
            f"{len(lone)} of {len(images.keys() | maps.keys())} names in {home} are an image without label map or the "
            f"other way round ({', '.join(lone[:3])}{', ...' if len(lone) > 3 else ''}); expected {found[0]}/x with "
            f"{found[0]}annot/x"
        )
    paths = [images[stem] for stem in sorted(images)]
    labels = [_labels(maps[stem], images[stem], len(classes), void, size) for stem in sorted(images)]
    rows = torch.arange(len(paths))
    files = Images(Paths(paths), rows, classes, mode=mode, size=size, transform=_as_it_is)
    return LabelMaps(files, labels, classes, void, transform)


def check_labels(labels: Tensor, classes: int, void: int, what: str) -> None:
    """Refuse labels that are neither a class nor void.

    Args:
        labels: whole numbers, of any shape.
        classes: how many there are.
        void: the label of pixels that belong to none.
        what: holds them, for the message.

    Raises:
        DataError: naming the least that is neither.
    """
    if not labels.numel():
        return
    outside = {int(label) for label in labels.aminmax() if not 0 <= label < classes}
    if not outside or (outside == {void} and void in (-1, classes)):  # between such a void and the classes is nothing
        return
    labels = labels.long()  # one byte would be compared with -1 as with 255
    strange = labels[((labels < 0) | (labels >= classes)) & (labels != void)]
    if strange.numel():
        raise DataError(
            f"{what} holds {int(strange.min())}; expected classes from 0 to {classes - 1}, or {void} for void"
        )


class Paths:
    """Encoded images by path."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = [str(path) for path in paths]

    def read(self, row: int) -> bytes:  # noqa: D102
        with open(self._paths[row], "rb") as file:
            return file.read()

    def name(self, row: int) -> str:  # noqa: D102
        return self._paths[row]


def decoded_size(path: Path) -> tuple[int, int] | None:
    """(width, height) as decoded, from the header alone; None of a corrupt image, which is reported when read."""
    pil = require("PIL.Image", "images")
    try:
        with pil.open(path) as image:
            lying = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)  # a photo stored lying down
            return (image.height, image.width) if lying else image.size
    except Exception:  # garbage raises almost anything
        return None


def _as_it_is(image: Tensor) -> Tensor:
    return image


def _by_stem(folder: Path) -> dict[str, Path]:
    """The image files of a folder by name without suffix."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror}); expected a folder of images") from error
    found: dict[str, Path] = {}
    for name in names:
        if name.lower().endswith(SUFFIXES) and not name.startswith("."):
            stem = Path(name).stem
            if stem in found:
                raise DataError(f"{folder} has {found[stem].name} and {name}; expected one file per name")
            found[stem] = folder / name
    return found


def _labels(path: Path, image: Path, classes: int, void: int, size: tuple[int, int] | None) -> Tensor:
    """Uint8 (H, W), cut and resized as its image is."""
    pil, ops = require("PIL.Image", "images"), require("PIL.ImageOps", "images")
    try:
        with pil.open(io.BytesIO(path.read_bytes())) as file:
            kind, map_ = file.mode, file.copy()
    except Exception as error:  # decoders meet garbage with OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"cannot decode the label map {path} ({type(error).__name__}); mend it or remove it") from error
    if kind not in ("L", "P"):
        raise DataError(f"the label map {path} has mode {kind}; expected one byte per pixel, grey (L) or palette (P)")
    check_labels(torch.from_numpy(np.asarray(map_).copy()), classes, void, f"the label map {path}")
    expected = decoded_size(image)
    if expected is not None and expected != map_.size:
        (w, h), (map_w, map_h) = expected, map_.size
        raise DataError(f"the label map {path} is {map_h} x {map_w} and its image {h} x {w}; expected one size")
    if size is not None and map_.size != (size[1], size[0]):
        map_ = ops.fit(map_, (size[1], size[0]), method=pil.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(map_).copy())


_ORIENTATION = 0x0112  # EXIF tag
