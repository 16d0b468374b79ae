"""An image goes with its own annotation, whatever is corrupt."""

import pytest
import torch

from dynanet.core.errors import DataError
from dynanet.data.annotated import AnnotatedImages, first_of, float_image, list_files, numbered
from tests.data.make_files import GARBAGE, noise, png


class Squares(AnnotatedImages):
    """The annotation of a row is its square."""

    def annotation(self, row):
        return row * row


def pair(image, annotation):
    return image, annotation


@pytest.fixture
def squares(tmp_path):
    def squares(broken=(), transform=pair):
        paths = []
        for row, image in enumerate(noise(100)):
            paths.append(tmp_path / f"{row}.png")
            paths[-1].write_bytes(GARBAGE if row in broken else png(image))
        return Squares(numbered(paths, ["none"], "RGB"), ["none"], transform)

    return squares


def test_images_are_as_written_and_go_with_their_annotation(squares):
    data, pixels = squares(), torch.from_numpy(noise(100)).permute(0, 3, 1, 2)
    assert len(data) == 100 and data.classes == ("none",)
    for row in (0, 7, 99):
        image, annotation = data[row]
        assert torch.equal(image, pixels[row]) and annotation == row * row
        assert data.name(row).endswith(f"{row}.png")


def test_in_place_of_a_corrupt_image_the_next_comes_with_its_own_annotation(squares):
    data = squares(broken=[7])
    (image, annotation), (after, _) = data[7], data[8]
    assert torch.equal(image, after) and annotation == 64
    assert list(data.corrupt) == [data.name(7)]


def test_images_become_shares_and_annotations_stay(squares):
    data = squares(transform=float_image)
    image, annotation = data[3]
    torch.testing.assert_close(image * 255, squares()[3][0].float())
    assert annotation == 9


def test_files_are_listed_by_suffix_in_order_without_hidden_ones(tmp_path):
    for name in ("b.PNG", "a.png", ".a.png", "c.txt", "png"):
        (tmp_path / name).touch()
    assert list_files(tmp_path, (".png",), "images") == ["a.png", "b.PNG"]


def test_a_folder_that_is_none_is_refused_with_what_was_expected(tmp_path):
    with pytest.raises(DataError, match="cannot read the folder .*nowhere .*; expected a folder of images"):
        list_files(tmp_path / "nowhere", (".png",), "a folder of images")


@pytest.mark.parametrize(("count", "says"), [(0, ""), (2, "0, 1"), (3, "0, 1, 2"), (4, "0, 1, 2, ...")])
def test_long_lists_are_cut(count, says):
    assert first_of([str(i) for i in range(count)]) == says
