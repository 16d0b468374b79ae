import io
from base64 import b64decode

import numpy as np
import pytest

from dynanet.report.pictures import coloured, data_uri, depth, dimmed, places, stride


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 3), (3, 5, 4)])
def test_pictures_are_png_with_these_pixels(shape):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    kind, data = data_uri(pixels).split(",")
    assert kind == "data:image/png;base64"
    with image.open(io.BytesIO(b64decode(data))) as picture:
        assert (np.asarray(picture) == pixels).all()


def test_what_has_no_class_is_transparent_and_what_cannot_be_checked_is_faint():
    index = np.array([[0, 1, -1, 0, 1, 0, 1, 0]])
    rgba = coloured(index, np.array([[10, 20, 30], [40, 50, 60]], np.uint8))
    assert rgba[0, 1].tolist() == [40, 50, 60, 255] and rgba[0, 2, 3] == 0
    faint = dimmed(rgba, np.array([[False] * 3 + [True] * 5]))
    assert (faint[0, :3] == rgba[0, :3]).all() and (faint[0, 3:, 3] < 128).all()
    assert set(faint[0, 3:, 3]) == {0, 70}  # hatched


def test_large_pictures_are_thinned():
    assert stride(145, 145) == 1 and stride(400, 20) == 1 and stride(401, 20) == 2
    assert 5000 / stride(100, 5000) <= 400


def test_numbers_stand_inside_their_fields():
    labels = np.full((20, 30), -1)
    labels[2:13, 3:14], labels[2:13, 14:29], labels[16, 3:20] = 4, 2, 7
    inner = depth(labels)
    assert inner[7, 8] == 6 and inner[2, 3] == 1 and inner[0, 0] == 0 and inner.max() == 6
    found = places(labels, apart=9)
    assert {label for _, _, label in found} == {4, 2}  # the third field is too narrow
    assert all(labels[row, column] == label and inner[row, column] >= 3 for row, column, label in found)
