"""A channel with one value trains like any other, in every kind of data, and is named where it varies elsewhere."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynanet.data.augment import channel_stats, normalise
from dynanet.data.deviations import warn_of_constants
from dynanet.data.images import ImageTensors
from dynanet.data.indian_pines import IndianPines, RawScene
from dynanet.data.ragged import SequenceSet
from dynanet.datamodules.images import labelled_images
from dynanet.datamodules.sequences import labelled_sequences


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 50))
def test_a_feature_of_one_value_becomes_zero(value, steps):
    torch.manual_seed(0)
    frames = torch.stack([torch.full((steps,), value), torch.randn(steps)], 1)
    data = SequenceSet([frames, frames + torch.tensor([0.0, 1.0])], torch.tensor([0, 1]), ["a", "b"])
    mean, deviation = data.statistics()
    assert deviation[0] == 1 and deviation[1] > 0
    assert data.standardized(mean, deviation).sequences[0][:, 0].abs().max() <= 1e-6 * abs(value)


@given(st.lists(st.integers(0, 255), min_size=3, max_size=3))
def test_a_channel_of_one_value_becomes_zero(values):
    images = torch.tensor(values, dtype=torch.uint8)[None, :, None, None].repeat(4, 1, 3, 2)
    mean, std = channel_stats(images)
    assert std.tolist() == [1, 1, 1]
    assert normalise(images, mean, std).abs().max() < 1e-6


def test_a_band_of_one_value_becomes_zero():
    labels = (torch.arange(144).reshape(12, 12) // 36).long()
    cube = torch.cat([torch.full((1, 12, 12), 0.1), torch.rand(1, 12, 12)])
    data = IndianPines("random_pixels_leaky", patch=3, scene=RawScene(cube, labels, (500.0, 600.0)))
    assert data.cube[0].abs().max() < 1e-6 and data.cube[1].std() > 0.5


def images(blue):
    pixels = torch.randint(0, 200, (12, 3, 8, 8), dtype=torch.uint8)
    pixels[:, 2] = blue
    return ImageTensors(pixels, torch.arange(12) % 2, ("a", "b"))


def series(value):
    frames = [torch.stack([torch.randn(5), torch.full((5,), value)], 1) for _ in range(4)]
    return SequenceSet(frames, torch.arange(4) % 2, ["a", "b"])


@pytest.mark.parametrize("elsewhere, named", [(7, 2), (0, 0)])
def test_a_channel_that_is_constant_in_training_only_is_named(elsewhere, named, caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, "dynanet.data"):
        opened = labelled_images("x", images(0), images(0), images(elsewhere), batch=4, seed=0, crop=0, flip=0)
        labelled_sequences("x", series(0.0), series(0.0), series(float(elsewhere)), batch=2, seed=0)
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == named
    assert not found or ("channel(s) [2]" in found[0] and "test part" in found[0] and "channel(s) [1]" in found[1])
    x, _ = next(iter(opened.train))
    assert x.isfinite().all() and not x[:, 2].any()


def test_no_values_have_no_constants(caplog):
    warn_of_constants(torch.zeros(0, 3), {"test": torch.zeros(2, 3)})
    warn_of_constants(torch.zeros(2, 3), {"test": torch.zeros(0, 3)})
    assert not caplog.records
