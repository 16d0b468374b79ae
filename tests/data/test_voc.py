"""Boxes in Pascal VOC's layout: small files, bad files, and the real set where it lies."""

import logging
import os
from pathlib import Path

import pytest
import torch

from dynanet.core.errors import DataError, MissingSplitError
from dynanet.data.voc import load_voc
from tests.data.make_files import GARBAGE, noise, png

REAL = Path(os.environ.get("DYNANET_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "bccd" / "BCCD"


def thing(name: str, *corners: float, difficult: int = 0) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"


def annotation(*things: str, size: tuple[int, int] = (20, 10), head: str = "") -> str:
    width, height = size
    return (
        f"{head}<annotation><size><width>{width}</width><height>{height}</height></size>{''.join(things)}</annotation>"
    )


def write(root: Path, annotations: list[str], **lists: str):
    """Images of 20 x 10 pixels, with these annotations and lists of names."""
    pixels = noise(len(annotations), height=10, width=20)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for k, text in enumerate(annotations):
        (root / "JPEGImages" / f"{k:03d}.png").write_bytes(png(pixels[k]))
        (root / "Annotations" / f"{k:03d}.xml").write_text(text)
    for name, names in lists.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(names)
    return pixels


def test_images_with_their_boxes(tmp_path):
    one = annotation(thing("cat", 1, 1, 20, 10), thing("ant", 3, 4, 3, 4, difficult=1))
    pixels = write(tmp_path, [one, annotation(), annotation(thing("bee", 2, 2, 9, 9))], val="002 -1\n\n001\n")
    data = load_voc(tmp_path)
    assert len(data) == 3 and data.classes == ("ant", "bee", "cat") and data.clipped == {}
    image, found = data[0]
    assert torch.equal(image, torch.from_numpy(pixels[0]).permute(2, 0, 1) / 255)
    assert found.boxes.tolist() == [[0, 0, 20, 10], [2, 3, 3, 4]]
    assert found.labels.tolist() == [2, 0] and found.difficult.tolist() == [False, True]
    image, found = data[1]
    assert found.boxes.shape == (0, 4) and found.labels.dtype == torch.int64 and found.difficult.dtype == torch.bool
    val = load_voc(tmp_path, "validation")
    assert val.classes == data.classes and [len(val[k][1].labels) for k in range(2)] == [1, 0]
    assert load_voc(tmp_path, "val", classes=["bee"])[0][1].labels.tolist() == [0]


def test_boxes_outside_are_named_and_clipped(tmp_path, caplog):
    boxes = [thing("cat", -4, 0, 30, 5), thing("ant", 25, 3, 29, 9), thing("bee", 2, 2, 9, 9)]
    write(tmp_path, [annotation(*boxes)])
    with caplog.at_level(logging.WARNING, "dynanet.data"):
        data = load_voc(tmp_path)
    assert data[0][1].boxes.tolist() == [[0, 0, 20, 5], [1, 1, 9, 9]] and data[0][1].labels.tolist() == [2, 1]
    first, second = (record.getMessage() for record in caplog.records)
    assert "cat in" in first and "000.png, -4 0 30 5 of 20 x 10; clipped" in first
    assert "ant in" in second and "left out" in second
    assert data.clipped == {str(tmp_path / "JPEGImages" / "000.png"): 2}


def test_a_corrupt_image_is_named_and_another_answers_with_its_own_boxes(tmp_path):
    write(tmp_path, [annotation(thing("cat", 1, 1, 1 + k // 10, 5)) for k in range(101)])
    bad = tmp_path / "JPEGImages" / "009.png"
    bad.write_bytes(GARBAGE)
    data = load_voc(tmp_path)
    assert data[9][1].boxes.tolist() == [[0, 0, 2, 5]]
    assert list(data.corrupt) == [str(bad)]


BILLION = '<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;">]>'
EXTERNAL = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]>'


@pytest.mark.parametrize(
    "text, says",
    [
        ("<annotation>", "cannot read .*000.xml .*expected a Pascal VOC annotation"),
        ("", "cannot read .*000.xml"),
        (annotation(head=BILLION), "document type 'a', which may define entities"),
        (annotation(thing("&b;", 1, 1, 2, 2), head=EXTERNAL), "document type 'a'"),
        (annotation(thing("cat", 1, 1, "x", 2)), "xmax is 'x' in .*000.xml; expected a number"),
        (annotation(thing("cat", 1, "nan", 2, 2)), "ymin is 'nan'"),
        (annotation("<object><name>cat</name></object>"), "xmin is None"),
        (annotation(thing(" ", 1, 1, 2, 2)), "has no name"),
        (annotation(thing("cat", 5, 1, 2, 2)), "a box from 5, 1 to 2, 2; expected the least corner first"),
        (annotation(thing("cat", 1, 1, 2, 2), size=(10, 20)), "000.png is 20 x 10 and .*000.xml says 10 x 20"),
        (annotation(thing("dog", 1, 1, 2, 2)), "an object 'dog'; expected one of cat, ant"),
    ],
)
def test_annotations_that_mean_nothing_are_refused(tmp_path, text, says):
    write(tmp_path, [text])
    with pytest.raises(DataError, match=says) as caught:
        load_voc(tmp_path, classes=["cat", "ant"])
    assert "\n" not in str(caught.value)


def test_wrong_folders(tmp_path):
    with pytest.raises(DataError, match="cannot read the folder .*JPEGImages"):
        load_voc(tmp_path)
    write(tmp_path, [annotation()], train="000\n007\n", val="")
    with pytest.raises(MissingSplitError, match="no list test.txt; it has train, val"):
        load_voc(tmp_path, "test")
    with pytest.raises(DataError, match="1 of 2 images of .* lack .*007"):
        load_voc(tmp_path, "train")
    with pytest.raises(DataError, match="no annotated images in 'val'"):
        load_voc(tmp_path, "val")


@pytest.mark.skipif(not REAL.is_dir(), reason="BCCD is not here")
def test_the_real_set():
    parts = [load_voc(REAL, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [205, 87, 72]
    assert all(part.classes == ("Platelets", "RBC", "WBC") and part.clipped == {} for part in parts)
    image, found = parts[0][0]
    assert image.shape == (3, 480, 640) and found.boxes.shape == (found.labels.shape[0], 4)
    assert sum(len(boxes.labels) for part in parts for boxes in part.boxes) == 4888


@pytest.mark.parametrize("end", ["\n", "\r\n", " 1\r\n", "  -1\n"])
def test_lists_name_images_with_spaces(tmp_path, end):
    write(tmp_path, [annotation(thing("cat", 1, 1, 5, 5))] * 4)
    names = ["IMG (1)", "IMG 1", "IMG", "å b"]
    for k, name in enumerate(names):
        for folder, suffix in (("JPEGImages", "png"), ("Annotations", "xml")):
            (tmp_path / folder / f"{k:03d}.{suffix}").rename(tmp_path / folder / f"{name}.{suffix}")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(
        b"\xef\xbb\xbf" + "".join(name + end for name in ["å b", "IMG (1)", "IMG 1"]).encode()
    )
    data = load_voc(tmp_path, "train")
    assert [Path(data.name(k)).stem for k in range(len(data))] == ["å b", "IMG (1)", "IMG 1"]
