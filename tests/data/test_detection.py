import os
from pathlib import Path

import pytest
import torch

from dynanet.core.errors import ConfigError, DataError
from dynanet.data.detection import (
    DetectionTensors,
    Normalize,
    RandomResizedFlipBoxes,
    moved,
    padded,
    to_memory,
    unpadded,
)
from dynanet.data.images import ImageTensors
from dynanet.data.voc import Boxes, DetectionImages, load_voc

REAL = Path(os.environ.get("DYNANET_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "bccd" / "BCCD"


def boxes(*rows, difficult=()):
    t = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    hard = torch.tensor([k in difficult for k in range(len(t))], dtype=torch.bool)
    return Boxes(t[:, 1:], t[:, 0].long(), hard)


def opened(images, *each):
    """As `load_voc` makes it, without files."""
    labelled = ImageTensors(images, torch.arange(len(images)), ["row"] * len(images), transform=lambda image: image)
    labelled.name = str
    return DetectionImages(labelled, each, ("a", "b"), lambda image, found: (image, found), {})


def test_boxes_are_resized_with_their_image():
    images = torch.zeros(2, 1, 20, 40, dtype=torch.uint8)
    images[0, :, 10:20, 20:40] = 200
    data = to_memory(opened(images, boxes([1, 20, 10, 40, 20]), boxes()), (10, 10))
    assert data.images.shape == (2, 1, 10, 10) and data[1][1].boxes.shape == (0, 4)
    image, found = data[0]
    left, top, right, bottom = found.boxes[0].int().tolist()
    assert (left, top, right, bottom) == (5, 5, 10, 10)
    assert image[0, top + 1 : bottom, left + 1 : right].min() > 150 and image[0, : top - 1].max() == 0
    same = to_memory(opened(images, boxes(), boxes()))
    assert torch.equal(same.images, images)


def test_padding():
    y = padded([boxes([1, 0, 0, 2, 2], [0, 1, 1, 3, 3]), boxes(), boxes([0, 1, 1, 2, 2], difficult=(0,))])
    assert y.shape == (3, 2, 5) and y[0].tolist() == [[1, 0, 0, 2, 2], [0, 1, 1, 3, 3]]
    assert y[1:, :, 0].tolist() == [[-1, -1], [-2, -1]]
    assert padded([boxes(), boxes()]).shape == (2, 0, 5)
    back = unpadded(y)
    assert back[0].labels.tolist() == [1, 0] and back[0].boxes.tolist() == [[0, 0, 2, 2], [1, 1, 3, 3]]
    assert [len(each.labels) for each in back] == [2, 0, 1]
    assert [each.difficult.tolist() for each in back] == [[False, False], [], [True]]
    hard = boxes([2, 0, 0, 2, 2], [0, 1, 1, 3, 3], difficult=(0, 1))
    assert all(torch.equal(*pair) for pair in zip(hard, unpadded(padded([hard]))[0], strict=True))


def test_augmented_boxes_lie_where_the_thing_went():
    torch.manual_seed(0)
    images = torch.zeros(1, 3, 40, 60, dtype=torch.uint8)
    images[..., 12:24, 18:42] = 255
    augment = RandomResizedFlipBoxes([0, 0, 0], [1, 1, 1], light=0.0)
    seen = set()
    for _ in range(20):
        x, y = augment.collate([(images[0], boxes([1, 18, 12, 42, 24]))])
        rows, columns = (x[0, 0] > 0.5).nonzero().unbind(1)
        here = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        if y[0, 0, 0] == 1:
            assert (y[0, 0, 1:] - torch.stack(here)).abs().max() <= 1
            seen.add(tuple(torch.stack(here).tolist()))
    assert len(seen) > 10


def test_boxes_that_leave_the_image_become_padding():
    y = torch.tensor([[[0.0, 0, 0, 10, 10], [1, 10, 0, 20, 10], [-1, 0, 0, 0, 0]]])
    shifted = moved(y, torch.ones(1, 2), torch.tensor([[0.6, 0.0]]), (10, 20), visible=0.39)  # to the left by 6
    assert shifted[0, :, 0].tolist() == [0, 1, -1]
    torch.testing.assert_close(shifted[0, :2, 1:], torch.tensor([[0.0, 0, 4, 10], [4, 0, 14, 10]]))
    assert moved(y, torch.ones(1, 2), torch.tensor([[0.7, 0.0]]), (10, 20), 0.4)[0, :, 0].tolist() == [-1, 1, -1]
    mirrored = moved(y[:, :1], torch.tensor([[-1.0, 1.0]]), torch.zeros(1, 2), (10, 20), 0.4)
    assert mirrored[0, 0].tolist() == [0, 10, 0, 20, 10]


def test_an_image_without_boxes_is_augmented_too():
    x, y = RandomResizedFlipBoxes([0.5], [0.5]).collate([(torch.zeros(1, 9, 7, dtype=torch.uint8), boxes())] * 3)
    assert x.shape == (3, 1, 9, 7) and y.shape == (3, 0, 5)
    x, y = Normalize([0.5], [0.5]).collate([(torch.full((1, 9, 7), 255, dtype=torch.uint8), boxes([1, 0, 0, 7, 9]))])
    assert x.eq(1).all() and y.tolist() == [[[1, 0, 0, 7, 9]]]


def test_what_does_not_fit():
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match="labels from 2 to 2; expected 0 to 1"):
        DetectionTensors(images, [boxes(), boxes([2, 0, 0, 1, 1])], ("a", "b"))
    with pytest.raises(DataError, match="boxes of 1"):
        DetectionTensors(images, [boxes()], ("a", "b"))
    with pytest.raises(ConfigError, match=r"size must be at least 1, got \(0, 8\)"):
        to_memory(opened(images, boxes(), boxes()), (0, 8))
    with pytest.raises(ConfigError, match="zoom"):
        RandomResizedFlipBoxes([0], [1], zoom=0.5)


def test_a_part():
    data = DetectionTensors(
        torch.zeros(3, 1, 8, 8, dtype=torch.uint8), [boxes(), boxes([1, 0, 0, 4, 4]), boxes()], "ab"
    )
    part = data.part(torch.tensor([1]))
    assert len(part) == 1 and part[0][1].labels.tolist() == [1]


@pytest.mark.skipif(not REAL.exists(), reason="the data is not here")
def test_the_real_set():
    data = load_voc(REAL, "test")
    data.images = data.images.part(torch.arange(3))
    data.boxes = data.boxes[:3]
    small = to_memory(data, (96, 128))
    assert small.images.shape == (3, 3, 96, 128)
    assert all((b.boxes[:, 2:] <= torch.tensor([128.0, 96.0])).all() for b in small.boxes)
