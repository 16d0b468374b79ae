import pytest
import torch
from torch.nn import functional

from dynanet.core.errors import ConfigError, DataError
from dynanet.data.pixel_labels import check_pixel_labels, pixel_cross_entropy


def test_void_pixels_do_not_count():
    logits = torch.randn(2, 3, 4, 5)
    labels = torch.randint(3, (2, 4, 5))
    labels[0, :2] = 255
    there = labels != 255
    expected = functional.cross_entropy(logits.permute(0, 2, 3, 1)[there], labels[there])
    torch.testing.assert_close(pixel_cross_entropy(logits, labels, 255), expected)
    assert pixel_cross_entropy(logits, torch.full_like(labels, 255), 255) == 0


def test_labels_that_do_not_fit_are_refused():
    answer = torch.randn(2, 3, 4, 5)
    check_pixel_labels(torch.tensor([0, 2, 255, 1, 0]).expand(2, 4, 5), answer, 255)
    with pytest.raises(ConfigError, match="one label per pixel"):
        check_pixel_labels(torch.zeros(2, 5, 4).long(), answer, 255)
    with pytest.raises(DataError, match="holds 3"):
        check_pixel_labels(torch.full((2, 4, 5), 3), answer, 255)
