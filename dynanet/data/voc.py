"""Boxes in Pascal VOC's layout: `JPEGImages/x.jpg`, `Annotations/x.xml`, and lists of names in `ImageSets/Main`.

Everingham et al.: The PASCAL Visual Object Classes (VOC) Challenge, IJCV 2010. The files count pixels from 1 and a
box's last pixel belongs to it; here a box is (left, top, right, bottom) in pixel edges from 0, so that its width is
right - left: what VOC writes as 1 1 640 480 is 0 0 640 480.

Annotations are read and checked when the data is loaded. A box that reaches outside its image is named in a warning of
the logger `dynanet.data` and clipped; one with nothing inside is left out. Documents that define entities are refused.
Images are decoded when asked for; a corrupt one is reported by name, as `data.images` says.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynanet.core.errors import DataError, MissingSplitError
from dynanet.data.camvid import Paths, decoded_size
from dynanet.data.folder import SUFFIXES
from dynanet.data.images import Images, log, to_float
from dynanet.data.splits import synonyms


class Boxes(NamedTuple):
    """What an image shows.

    Attributes:
        boxes: (N, 4) float32, left, top, right, bottom in pixels; N may be 0.
        labels: (N,) int64 classes.
        difficult: (N,) bool: neither to be found nor to be missed.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


def reversed_corners(boxes: Tensor) -> Tensor:
    """Which boxes have their corners the wrong way round, or are not numbers: (..., 4) to bool (...)."""
    return ~(boxes[..., :2] <= boxes[..., 2:]).all(-1)


BoxTransform = Callable[[Tensor, Boxes], Any]


def plain(image: Tensor, boxes: Boxes) -> tuple[Tensor, Boxes]:
    """The image float32 in [0, 1], the boxes as they are."""
    return to_float(image), boxes


class DetectionImages(Dataset[Any]):
    """Images and their boxes; `load_voc` makes it.

    A row is what `transform` makes of (image uint8 (C, H, W), Boxes). A corrupt image is reported, and the next good
    one answers in its place, with its own boxes.

    Args:
        images: labelled with their own row numbers, and not transformed.
        boxes: per image.
        classes: the classes' names.
        transform: see above.
        clipped: see below.

    Attributes:
        boxes: per image, to score against.
        classes: the classes' names.
        clipped: image -> how many of its boxes reached outside, and were clipped or left out.
    """

    def __init__(
        self,
        images: Images,
        boxes: Sequence[Boxes],
        classes: Sequence[str],
        transform: BoxTransform,
        clipped: dict[str, int],
    ) -> None:
        assert len(images) == len(boxes), "boxes for every image"
        self._images, self.boxes = images, tuple(boxes)
        self.classes, self.transform, self.clipped = tuple(classes), transform, clipped

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int) -> Any:
        image, row = self._images[index]  # of a good one, which may be a later row
        return self.transform(image, self.boxes[row])

    @property
    def corrupt(self) -> dict[str, str]:
        """Name -> reason, of every image found to be corrupt so far."""
        return self._images.corrupt

    def name(self, index: int) -> str:
        """The path of an image."""
        return self._images.name(index)


def load_voc(
    root: str | Path,
    split: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    mode: str = "RGB",
    transform: BoxTransform = plain,
) -> DetectionImages:
    """A data set in Pascal VOC's layout.

    Args:
        root: the folder that holds `JPEGImages` and `Annotations`.
        split: the list `ImageSets/Main/<split>.txt` ("val" also finds "validation", and so on); None for every
            annotated image.
        classes: the names, in the order of labels; None for those met in all annotations, sorted, so that a label
            means the same in every split.
        mode: "RGB" or "L".
        transform: gets every pair, uint8 (C, H, W) and Boxes.

    Raises:
        DataError: a folder that cannot be read; no images; an image or annotation that is missing; XML that is broken
            or defines entities; an object without a name or with a box that means nothing; an unknown class; another
            image size than annotated.
        MissingSplitError: no such list.
    """
    home = Path(root)
    images = {Path(name).stem: home / "JPEGImages" / name for name in _names(home / "JPEGImages", SUFFIXES)}
    annotated = [Path(name).stem for name in _names(home / "Annotations", (".xml",))]
    stems = annotated if split is None else _listed(home / "ImageSets" / "Main", split)
    if not stems:
        raise DataError(f"{home} has no annotated images{'' if split is None else f' in {split!r}'}; expected some")
    both = images.keys() & set(annotated)
    lone = [stem for stem in stems if stem not in both]
    if lone:
        raise DataError(
            f"{len(lone)} of {len(stems)} images of {home} lack JPEGImages/x.jpg or Annotations/x.xml "
            f"({', '.join(lone[:3])}{', ...' if len(lone) > 3 else ''}); add the files, or mend the list"
        )
    read = {stem: _read(home / "Annotations" / f"{stem}.xml") for stem in (stems if classes else annotated)}
    named = tuple(classes) if classes else tuple(sorted({name for notes in read.values() for name in notes.names}))
    clipped: dict[str, int] = {}
    boxes = [_checked(read[stem], images[stem], named, clipped) for stem in stems]
    paths = Paths([images[stem] for stem in stems])
    files = Images(paths, torch.arange(len(stems)), named, mode=mode, transform=_as_it_is)
    return DetectionImages(files, boxes, named, transform, clipped)


class _Notes(NamedTuple):
    """One annotation file as written: (width, height) or None, and the objects."""

    path: Path
    size: tuple[int, int] | None
    names: list[str]
    corners: list[list[float]]
    difficult: list[bool]


class _NoEntities(ElementTree.TreeBuilder):
    """Refuses document types: nothing in this format needs one, and entities can read files or fill the memory."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError(f"it has a document type {name!r}, which may define entities")


def _as_it_is(image: Tensor) -> Tensor:
    return image


def _names(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise DataError(
            f"cannot read the folder {folder} ({error.strerror}); expected Pascal VOC's JPEGImages and Annotations"
        ) from error
    return [name for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]


def _listed(folder: Path, split: str) -> list[str]:
    """The names in a split's list: the first word of every line."""
    found = [folder / f"{name}.txt" for name in synonyms(split) if (folder / f"{name}.txt").is_file()]
    if not found:
        there = sorted(path.stem for path in folder.glob("*.txt"))
        raise MissingSplitError(f"{folder} has no list {split}.txt; it has {', '.join(there) or 'none'}")
    try:
        lines = found[0].read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {found[0]} ({type(error).__name__}); expected a name per line") from error
    return [line.split()[0] for line in lines if line.split()]


def _read(path: Path) -> _Notes:
    try:
        tree = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_NoEntities()))
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise DataError(f"cannot read {path} ({error}); expected a Pascal VOC annotation") from error
    sides = [_number(tree.findtext(f"size/{side}"), path, side) for side in ("width", "height")] if _sized(tree) else []
    notes = _Notes(path, (int(sides[0]), int(sides[1])) if sides and all(sides) else None, [], [], [])
    for thing in tree.findall("object"):
        name = (thing.findtext("name") or "").strip()
        if not name:
            raise DataError(f"an object in {path} has no name; expected <name>class</name>")
        notes.names.append(name)
        notes.corners.append(
            [_number(thing.findtext(f"bndbox/{side}"), path, side) for side in ("xmin", "ymin", "xmax", "ymax")]
        )
        notes.difficult.append((thing.findtext("difficult") or "0").strip() == "1")
    return notes


def _sized(tree: ElementTree.Element) -> bool:
    return tree.find("size") is not None


def _number(text: str | None, path: Path, what: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{what} is {text!r} in {path}; expected a number of pixels")
    return value


def _checked(notes: _Notes, image: Path, classes: Sequence[str], clipped: dict[str, int]) -> Boxes:
    """Boxes inside their image, from 0, in pixel edges."""
    decoded = decoded_size(image)
    if decoded is not None and notes.size is not None and decoded != notes.size:
        raise DataError(
            f"{image} is {decoded[0]} x {decoded[1]} and {notes.path} says {notes.size[0]} x {notes.size[1]}; "
            f"expected boxes for this very image"
        )
    if bool((backwards := reversed_corners(torch.tensor(notes.corners).reshape(-1, 4))).any()):
        xmin, ymin, xmax, ymax = notes.corners[int(backwards.nonzero()[0])]
        raise DataError(
            f"{notes.path} has a box from {xmin:g}, {ymin:g} to {xmax:g}, {ymax:g}; expected the least corner first"
        )
    size = decoded or notes.size  # a corrupt image is reported when it is read
    kept: list[tuple[list[float], int, bool]] = []
    for name, (xmin, ymin, xmax, ymax), difficult in zip(notes.names, notes.corners, notes.difficult, strict=True):
        if name not in classes:
            raise DataError(f"{notes.path} has an object {name!r}; expected one of {', '.join(classes)}")
        box = [xmin - 1, ymin - 1, xmax, ymax]
        if size is not None:
            inside = [min(max(edge, 0.0), float(size[i % 2])) for i, edge in enumerate(box)]
            if inside != box:
                clipped[str(image)] = clipped.get(str(image), 0) + 1
                gone = inside[0] >= inside[2] or inside[1] >= inside[3]
                log.warning(
                    "box outside its image: %s in %s, %g %g %g %g of %d x %d; %s",
                    name, image, xmin, ymin, xmax, ymax, *size, "left out" if gone else "clipped",
                )  # fmt: skip
                if gone:
                    continue
                box = inside
        kept.append((box, list(classes).index(name), difficult))
    return Boxes(
        torch.tensor([box for box, _, _ in kept], dtype=torch.float32).reshape(len(kept), 4),
        torch.tensor([label for _, label, _ in kept], dtype=torch.int64),
        torch.tensor([difficult for _, _, difficult in kept], dtype=torch.bool),
    )
