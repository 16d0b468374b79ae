"""Segmentation in SegNet's layout: `root/train/x.png` has its labels in `root/trainannot/x.png`; so do val and test.

CamVid's road scenes have it (Brostow, Fauqueur, Cipolla: Semantic object classes in video, 2009; splits and the 11
classes of SegNet, https://arxiv.org/abs/1511.00561), and so may any other data. A label map holds a class per pixel;
`VOID` marks pixels without one, which losses and scores ignore (`cross_entropy(ignore_index=data.void)`).

Label maps are read and checked when the data is loaded, and stay in memory (one byte per pixel), so that a damaged one
fails before training. Images are decoded on access; see `data.images` for corrupt ones.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynanet.core.errors import DataError, MissingSplitError, require
from dynanet.data.annotated import AnnotatedImages, first_of, float_image, list_files, numbered
from dynanet.data.images import SUFFIXES, Images, decoded_size
from dynanet.data.splits import synonyms

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
VOID = 11

PairTransform = Callable[[Tensor, Tensor], Any]


class LabelMaps(AnnotatedImages):
    """Images with a class per pixel; `load_camvid` makes it.

    A row is what `transform` makes of (image uint8 (C, H, W), labels int64 (H, W)).

    Args:
        images: as in `AnnotatedImages`.
        maps: the labels of each image, uint8 (H, W).
        classes: the classes' names.
        void: the label of pixels without a class.
        transform: see above.

    Attributes:
        maps: the labels of each image, uint8 (H, W).
        void: the label that losses and scores ignore.
    """

    def __init__(
        self, images: Images, maps: Sequence[Tensor], classes: Sequence[str], void: int, transform: PairTransform
    ) -> None:
        super().__init__(images, classes, transform)
        self.maps = tuple(maps)
        self.void = void

    def annotation(self, row: int) -> Tensor:
        """The labels of an image, int64 (H, W)."""
        return self.maps[row].to(torch.int64)


def load_camvid(
    root: str | Path,
    split: str,
    *,
    classes: Sequence[str] = CLASSES,
    void: int = VOID,
    mode: str = "RGB",
    size: tuple[int, int] | None = None,
    transform: PairTransform = float_image,
) -> LabelMaps:
    """A split of CamVid, or of other data in SegNet's layout.

    Args:
        root: the folder that holds `train/`, `trainannot/`, ...
        split: the folder of the images ("val" also finds "validation", and so on).
        classes: the names of labels 0, 1, 2, ...
        void: the label of pixels without a class.
        mode: "RGB" or "L".
        size: (H, W) to resize to, after a central crop to that aspect; labels take the nearest pixel's.
        transform: applied to every pair, uint8 (C, H, W) and int64 (H, W).

    Raises:
        DataError: a folder that cannot be read or is empty; images without label map, or the reverse; a label map
            that cannot be decoded, has not one byte per pixel or not the size of its image, or labels that are neither
            a class nor void.
        MissingSplitError: no such split.
    """
    home = Path(root)
    found = [name for name in synonyms(split) if (home / name).is_dir()]
    if not found:
        there = sorted(p.name for p in home.iterdir() if p.is_dir()) if home.is_dir() else []
        raise MissingSplitError(f"{home} has no split {split!r}; it has {', '.join(there) or 'no subfolders'}")
    images = _by_stem(home / found[0])
    maps = _by_stem(home / f"{found[0]}annot")
    if not images:
        raise DataError(f"{home / found[0]} has no images; expected files like 0001.png")
    if images.keys() != maps.keys():
        lone = sorted(images.keys() ^ maps.keys())
        raise DataError(
            f"{len(lone)} of {len(images.keys() | maps.keys())} names in {home} are an image without label map or the "
            f"reverse ({first_of(lone)}); expected {found[0]}/x with "
            f"{found[0]}annot/x"
        )
    stems = sorted(images)
    labels = [_labels(maps[stem], images[stem], len(classes), void, size) for stem in stems]
    found_images = numbered([images[stem] for stem in stems], classes, mode, size)
    return LabelMaps(found_images, labels, classes, void, transform)


def check_labels(labels: Tensor, classes: int, void: int, what: str) -> None:
    """Refuse labels that are neither a class nor void.

    Args:
        labels: whole numbers, of any shape.
        classes: number of classes.
        void: the label of pixels without a class.
        what: what holds the labels, for the message.

    Raises:
        DataError: naming the smallest invalid label.
    """
    if not labels.numel():
        return
    outside = {int(label) for label in labels.aminmax() if not 0 <= label < classes}
    if not outside or (
        outside == {void} and void in (-1, classes)
    ):  # no invalid label lies between these and the classes
        return
    labels = labels.long()  # in uint8, -1 would compare as 255
    strange = labels[((labels < 0) | (labels >= classes)) & (labels != void)]
    if strange.numel():
        raise DataError(
            f"{what} holds {int(strange.min())}; expected classes from 0 to {classes - 1}, or {void} for void"
        )


def _by_stem(folder: Path) -> dict[str, Path]:
    """The image files of a folder by name without suffix."""
    found: dict[str, Path] = {}
    for name in list_files(folder, SUFFIXES, "a folder of images"):
        stem = Path(name).stem
        if stem in found:
            raise DataError(f"{folder} has {found[stem].name} and {name}; expected one file per name")
        found[stem] = folder / name
    return found


def _labels(path: Path, image: Path, classes: int, void: int, size: tuple[int, int] | None) -> Tensor:
    """Uint8 (H, W), cropped and resized as its image."""
    pil = require("PIL.Image", "images")
    ops = require("PIL.ImageOps", "images")
    try:
        with pil.open(io.BytesIO(path.read_bytes())) as file:
            kind = file.mode
            map_ = file.copy()
    except Exception as error:  # decoders meet garbage with OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"cannot decode the label map {path} ({type(error).__name__}); repair or remove it") from error
    if kind not in ("L", "P"):
        raise DataError(f"the label map {path} has mode {kind}; expected one byte per pixel, grey (L) or palette (P)")
    check_labels(torch.from_numpy(np.asarray(map_).copy()), classes, void, f"the label map {path}")
    expected = decoded_size(image)
    if expected is not None and expected != map_.size:
        w, h = expected
        map_w, map_h = map_.size
        raise DataError(f"the label map {path} is {map_h} x {map_w} and its image {h} x {w}; expected one size")
    if size is not None and map_.size != (size[1], size[0]):
        map_ = ops.fit(map_, (size[1], size[0]), method=pil.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(map_).copy())
