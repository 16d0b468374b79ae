"""Boxes in Pascal VOC's layout: `JPEGImages/x.jpg`, `Annotations/x.xml`, and lists of names in `ImageSets/Main`.

Everingham et al.: The PASCAL Visual Object Classes (VOC) Challenge, IJCV 2010. The files count pixels from 1 and a
box's last pixel belongs to it; here a box is (left, top, right, bottom) in pixel edges from 0, so that its width is
right - left: what VOC writes as 1 1 640 480 is 0 0 640 480.

Annotations are read and checked when the data is loaded. A box that reaches outside its image is clipped, and left out
if nothing remains; either is a warning of the logger `dynanet.data`. Documents that define entities are refused. Images
are decoded on access; see `data.images` for corrupt ones.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from torch import Tensor

from dynanet.core.errors import DataError, MissingSplitError
from dynanet.data.annotated import AnnotatedImages, first_of, float_image, list_files, numbered
from dynanet.data.images import SUFFIXES, Images, decoded_size, log
from dynanet.data.lines import read_lines
from dynanet.data.splits import synonyms


class Boxes(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: (N, 4) float32, left, top, right, bottom in pixels; N may be 0.
        labels: (N,) int64 classes.
        difficult: (N,) bool: ignored by scores, whether detected or not.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


def reversed_corners(boxes: Tensor) -> Tensor:
    """Which boxes have swapped corners or NaN: (..., 4) to bool (...)."""
    return ~(boxes[..., :2] <= boxes[..., 2:]).all(-1)


BoxTransform = Callable[[Tensor, Boxes], Any]


class DetectionImages(AnnotatedImages):
    """Images with boxes; `load_voc` makes it.

    A row is what `transform` makes of (image uint8 (C, H, W), Boxes).

    Args:
        images: as in `AnnotatedImages`.
        boxes: the boxes of each image.
        classes: the classes' names.
        transform: see above.
        clipped: see below.

    Attributes:
        boxes: the boxes of each image, to score against.
        clipped: image -> how many of its boxes reached outside it.
    """

    def __init__(
        self,
        images: Images,
        boxes: Sequence[Boxes],
        classes: Sequence[str],
        transform: BoxTransform,
        clipped: dict[str, int],
    ) -> None:
        super().__init__(images, classes, transform)
        self.boxes = tuple(boxes)
        self.clipped = clipped

    def annotation(self, row: int) -> Boxes:
        """The boxes of an image."""
        return self.boxes[row]


def load_voc(
    root: str | Path,
    split: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    mode: str = "RGB",
    transform: BoxTransform = float_image,
) -> DetectionImages:
    """A data set in Pascal VOC's layout.

    Args:
        root: the folder that holds `JPEGImages` and `Annotations`.
        split: the list `ImageSets/Main/<split>.txt` ("val" also finds "validation", and so on); None for every
            annotated image.
        classes: the names, in the order of labels; None for all names in the annotations, sorted, so that a label
            means the same in every split.
        mode: "RGB" or "L".
        transform: applied to every pair, uint8 (C, H, W) and Boxes.

    Raises:
        DataError: a folder that cannot be read; no images; a missing image or annotation; XML that is broken or
            defines entities; an object without a name or with an invalid box; an unknown class; another image size
            than annotated.
        MissingSplitError: no such list.
    """
    home = Path(root)
    layout = "Pascal VOC's JPEGImages and Annotations"
    files = list_files(home / "JPEGImages", SUFFIXES, layout)
    images = {Path(name).stem: home / "JPEGImages" / name for name in files}
    annotated = [Path(name).stem for name in list_files(home / "Annotations", (".xml",), layout)]
    stems = annotated if split is None else _listed(home / "ImageSets" / "Main", split, images)
    if not stems:
        raise DataError(f"{home} has no annotated images{'' if split is None else f' in {split!r}'}; expected some")
    both = images.keys() & set(annotated)
    lone = [stem for stem in stems if stem not in both]
    if lone:
        raise DataError(
            f"{len(lone)} of {len(stems)} images of {home} lack JPEGImages/x.jpg or Annotations/x.xml "
            f"({first_of(lone)}); add the files, or correct the list"
        )
    read = {stem: _read(home / "Annotations" / f"{stem}.xml") for stem in (stems if classes else annotated)}
    named = tuple(classes) if classes else tuple(sorted({name for notes in read.values() for name in notes.names}))
    clipped: dict[str, int] = {}
    boxes = [_checked(read[stem], images[stem], named, clipped) for stem in stems]
    found = numbered([images[stem] for stem in stems], named, mode)
    return DetectionImages(found, boxes, named, transform, clipped)


class _Notes(NamedTuple):
    """One annotation file as written: (width, height) or None, and the objects."""

    path: Path
    size: tuple[int, int] | None
    names: list[str]
    corners: list[list[float]]
    difficult: list[bool]


class _NoEntities(ElementTree.TreeBuilder):
    """Refuses document types: the format needs none, and entities can read files or exhaust memory."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError(f"it has a document type {name!r}, which may define entities")


def _listed(folder: Path, split: str, known: Collection[str]) -> list[str]:
    """The names in a split's list, one per line; lists of a class have a flag of -1, 0 or 1 behind each."""
    found = [folder / f"{name}.txt" for name in synonyms(split) if (folder / f"{name}.txt").is_file()]
    if not found:
        there = sorted(path.stem for path in folder.glob("*.txt"))
        raise MissingSplitError(f"{folder} has no list {split}.txt; it has {', '.join(there) or 'none'}")
    return [_name(line.strip(), known) for line in read_lines(found[0], "a name per line") if line.strip()]


def _name(line: str, known: Collection[str]) -> str:
    """The whole line if an image has this name, for names may hold spaces; else the line without its flag."""
    flagged = re.fullmatch(r"(.*\S)\s+[+-]?[01]", line)
    return line if line in known or flagged is None else flagged[1]


def _read(path: Path) -> _Notes:
    try:
        tree = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_NoEntities()))
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise DataError(f"cannot read {path} ({error}); expected a Pascal VOC annotation") from error
    size = None
    if tree.find("size") is not None:
        width, height = (int(_number(tree.findtext(f"size/{side}"), path, side)) for side in ("width", "height"))
        size = (width, height) if width and height else None
    notes = _Notes(path, size, [], [], [])
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


def _number(text: str | None, path: Path, what: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{what} is {text!r} in {path}; expected a number of pixels")
    return value


def _checked(notes: _Notes, image: Path, classes: Sequence[str], clipped: dict[str, int]) -> Boxes:
    """Boxes in pixel edges from 0, clipped to their image."""
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
    for name, corners, difficult in zip(notes.names, notes.corners, notes.difficult, strict=True):
        if name not in classes:
            raise DataError(f"{notes.path} has an object {name!r}; expected one of {', '.join(classes)}")
        xmin, ymin, xmax, ymax = corners
        box = [xmin - 1, ymin - 1, xmax, ymax]
        inside = box if size is None else [min(max(edge, 0.0), float(size[i % 2])) for i, edge in enumerate(box)]
        empty = inside != box and (inside[0] >= inside[2] or inside[1] >= inside[3])
        if inside != box and size is not None:
            clipped[str(image)] = clipped.get(str(image), 0) + 1
            log.warning(
                "box outside its image: %s in %s, %g %g %g %g of %d x %d; %s",
                name, image, *corners, *size, "left out" if empty else "clipped",
            )  # fmt: skip
        if not empty:
            kept.append((inside, list(classes).index(name), difficult))
    return Boxes(
        torch.tensor([box for box, _, _ in kept], dtype=torch.float32).reshape(len(kept), 4),
        torch.tensor([label for _, label, _ in kept], dtype=torch.int64),
        torch.tensor([difficult for _, _, difficult in kept], dtype=torch.bool),
    )
