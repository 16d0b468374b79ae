"""Sizes of a vision transformer fit together, or are refused where they are written."""

import re
from dataclasses import replace

import pytest
import torch

from dynanet.core.errors import ConfigError, InputError
from dynanet.zoo.vit_config import ViTConfig, check_heads

TINY = ViTConfig(num_classes=3, in_channels=2, size=12, patch=4, width=6, depth=1, heads=3, expansion=2)


@pytest.mark.parametrize(("size", "patch", "tokens"), [(12, 4, 9), (12, 12, 1), (12, 1, 144)])
def test_patches_cover_the_image(size, patch, tokens):
    assert replace(TINY, size=size, patch=patch).tokens == tokens


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"patch": 5}, "size must be a multiple of patch = 5, got 12"),
        ({"heads": 4}, "width must be a multiple of heads = 4, got 6"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"in_channels": 1.5}, "in_channels must be a whole number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        replace(TINY, **change)


@pytest.mark.parametrize("shape", [(2, 12, 8), (2, 8, 12), (1, 12, 12), (2, 24, 24)])
def test_images_of_another_size_are_refused_with_both_sizes(shape):
    for batch in (0, 1, 5):
        TINY.check_images(torch.zeros(batch, 2, 12, 12))
    with pytest.raises(InputError, match=re.escape(f"images of {shape}; this network takes (2, 12, 12)")):
        TINY.check_images(torch.zeros(1, *shape))


def test_heads_divide_the_width():
    check_heads(12, 3)
    with pytest.raises(ConfigError, match="heads = 5, got 12"):
        check_heads(12, 5)
