"""Segmentation in SegNet's layout: small files, bad files, and the real set where it lies."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dynanet.core.errors import DataError, MissingSplitError
from dynanet.data.camvid import CLASSES, VOID, load_camvid
from tests.data.make_files import GARBAGE, Image, noise, png

REAL = Path(os.environ.get("DYNANET_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "camvid"
CLASSES_3 = ("sky", "road", "car")


def write(root: Path, split: str, images: np.ndarray, maps: np.ndarray) -> list[Path]:
    paths = []
    for k, (image, labels) in enumerate(zip(images, maps, strict=True)):
        for folder, pixels in ((split, image), (f"{split}annot", labels[..., None])):
            path = root / folder / f"{k:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(pixels))
        paths.append(root / split / f"{k:03d}.png")
    return paths


def maps(count: int, height: int = 6, width: int = 5) -> np.ndarray:
    """Labels 0, 1, 2 and void."""
    return np.random.default_rng(1).choice(np.array([0, 1, 2, VOID], np.uint8), (count, height, width))


def load(root: Path, split: str = "train", **options):
    return load_camvid(root, split, classes=CLASSES_3, **options)


def test_images_with_their_labels(tmp_path):
    pixels, labels = noise(3), maps(3)
    write(tmp_path, "train", pixels, labels)
    data = load(tmp_path)
    assert len(data) == 3 and data.classes == CLASSES_3 and data.void == 11
    for k in range(3):
        image, truth = data[k]
        assert image.dtype == torch.float32 and truth.dtype == torch.int64
        assert torch.equal(image, torch.from_numpy(pixels[k]).permute(2, 0, 1) / 255)
        assert torch.equal(truth, torch.from_numpy(labels[k]).long())
    assert data.name(2).endswith("train/002.png")


def test_void_trains_nothing(tmp_path):
    write(tmp_path, "train", noise(2), np.stack([maps(1)[0], np.full((6, 5), VOID, np.uint8)]))
    data = load(tmp_path)
    logits = torch.randn(2, 3, 6, 5, requires_grad=True)
    truth = torch.stack([data[0][1], data[1][1]])
    torch.nn.functional.cross_entropy(logits, truth, ignore_index=data.void, reduction="sum").backward()
    assert not logits.grad[1].any()
    assert torch.equal(logits.grad[0].abs().sum(0) > 0, truth[0] != VOID)


def test_both_are_cut_and_resized_alike_and_transformed_together(tmp_path):
    pixels, labels = np.zeros((1, 8, 12, 3), np.uint8), np.zeros((1, 8, 12), np.uint8)
    pixels[:, :, 6:], labels[:, :, 6:] = 255, 2
    write(tmp_path, "validation", pixels, labels)
    data = load(tmp_path, "val", size=(4, 4), transform=lambda image, truth: (image.flip(-1), truth.flip(-1)))
    image, truth = data[0]
    assert image.shape == (3, 4, 4) and truth.shape == (4, 4)
    assert truth[:, 0].tolist() == [2] * 4 and truth[:, 3].tolist() == [0] * 4
    assert set(truth.unique().tolist()) == {0, 2}  # no class between
    assert (image[:, :, 0] > image[:, :, 3]).all()


def test_palette_maps_hold_their_indices(tmp_path):
    write(tmp_path, "train", noise(1), maps(1))
    coloured = Image.new("P", (5, 6))
    coloured.putpalette([value for k in range(256) for value in (255 - k, k, 7)])
    coloured.putdata(maps(1)[0].flatten().tolist())
    coloured.save(tmp_path / "trainannot" / "000.png")
    assert torch.equal(load(tmp_path)[0][1], torch.from_numpy(maps(1)[0]).long())


def test_a_corrupt_image_is_named_and_another_pair_answers(tmp_path):
    pixels, labels = noise(101), maps(101)
    paths = write(tmp_path, "train", pixels, labels)
    paths[7].write_bytes(GARBAGE)
    data = load(tmp_path)
    image, truth = data[7]
    assert list(data.corrupt) == [str(paths[7])]
    assert torch.equal(image, torch.from_numpy(pixels[8]).permute(2, 0, 1) / 255)
    assert torch.equal(truth, torch.from_numpy(labels[8]).long())
    paths[20].write_bytes(b"")
    with pytest.raises(DataError, match="2 of 101 images found corrupt.*020.png"):
        data[20]


def test_what_is_wrong_is_told_on_loading(tmp_path):
    write(tmp_path, "train", noise(2), maps(2))
    bad = tmp_path / "trainannot" / "001.png"

    def refused(match, error=DataError, split="train", **options):
        with pytest.raises(error, match=match) as caught:
            load(tmp_path, split, **options)
        assert "\n" not in str(caught.value)

    refused("no split 'test'; it has train, trainannot", MissingSplitError, "test")
    (tmp_path / "val").mkdir()
    refused("cannot read the folder .*valannot", split="val")
    (tmp_path / "valannot").mkdir()
    refused("val has no images", split="val")
    bad.write_bytes(png(maps(1, height=7)[0][..., None]))
    refused("001.png is 7 x 5 and its image 6 x 5; expected one size")
    bad.write_bytes(png(np.full((6, 5, 1), 3, np.uint8)))
    refused("001.png holds 3; expected classes from 0 to 2, or 11 for void")
    bad.write_bytes(png(noise(1)[0]))
    refused("001.png has mode RGB")
    bad.write_bytes(GARBAGE)
    refused("cannot decode the label map .*001.png")
    bad.unlink()
    refused("1 of 2 names .* an image without label map .*001")
    with pytest.raises(MissingSplitError, match="no subfolders"):
        load(tmp_path / "absent")


def test_two_files_of_one_name_are_refused(tmp_path):
    write(tmp_path, "train", noise(1), maps(1))
    (tmp_path / "train" / "000.bmp").write_bytes(png(noise(1)[0]))
    with pytest.raises(DataError, match="000.bmp and 000.png; expected one file per name"):
        load(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="CamVid is not here")
def test_the_real_set():
    data = load_camvid(REAL, "val")
    assert len(data) == 101 and len(data.classes) == len(CLASSES) == 11
    image, truth = data[0]
    assert image.shape == (3, 180, 240) and truth.shape == (180, 240)
    assert set(truth.unique().tolist()) <= {*range(11), VOID} and (truth == CLASSES.index("road")).any()
