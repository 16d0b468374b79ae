"""Every augmented image is a crop of its own padded image, perhaps mirrored; nothing else."""

import pytest
import torch
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from dynanet.core.errors import ConfigError, DataError
from dynanet.data.augment import CropFlip, channel_stats, normalise, random_crop, random_flip
from dynanet.data.images import ImageTensors


def images(count=40, dtype=torch.uint8):
    return torch.randint(1, 256, (count, 3, 6, 5), generator=torch.Generator().manual_seed(1)).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def where_from(crop, image, padding):
    """All (top, left) at which the crop lies in the padded image."""
    padded = pad(image, (padding,) * 4)
    height, width = image.shape[1:]
    places = [(y, x) for y in range(2 * padding + 1) for x in range(2 * padding + 1)]
    return [(y, x) for y, x in places if torch.equal(padded[:, y : y + height, x : x + width], crop)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_crop_is_a_window_of_its_own_image(dtype):
    batch = images(300, dtype)
    crops = random_crop(batch, 2, generator())
    assert crops.dtype == dtype and crops.shape == batch.shape
    found = [where_from(crop, image, 2) for crop, image in zip(crops, batch, strict=True)]
    assert all(len(places) == 1 for places in found)
    assert {places[0] for places in found} == {(y, x) for y in range(5) for x in range(5)}


def test_a_flip_mirrors_about_half_of_the_images():
    batch = images(400)
    flipped = random_flip(batch, 0.5, generator())
    same = (flipped == batch).flatten(1).all(1)
    mirrored = (flipped == batch.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 150 < int(mirrored.sum()) < 250
    assert torch.equal(random_flip(batch, 0.0, generator()), batch)
    assert torch.equal(random_flip(batch, 1.0, generator()), batch.flip(-1))


def test_draws_belong_to_the_generator():
    batch = images()
    state = torch.get_rng_state()
    augment = [CropFlip([0.5] * 3, [0.2] * 3, padding=2, generator=generator(seed)) for seed in (5, 5, 6)]
    first, again, other = (draw(batch) for draw in augment)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(augment[0](batch), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_and_single_batches():
    augment = CropFlip([0.5] * 3, [0.2] * 3)
    assert augment(images(0)).shape == (0, 3, 6, 5) and augment(images(1)).shape == (1, 3, 6, 5)


def test_normalise_with_the_sets_own_statistics():
    batch = images(200)
    mean, std = channel_stats(batch)
    pixels = (batch.double() / 255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), pixels.mean(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(std.double(), pixels.std(1, correction=0), atol=1e-6, rtol=0)
    done = normalise(batch, mean, std)
    assert done.dtype == torch.float32
    torch.testing.assert_close(done, normalise(batch.float() / 255, mean.tolist(), std.tolist()))
    torch.testing.assert_close(done.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(done[4], normalise(batch[4], mean, std))


def test_padding_is_black_before_normalising():
    augment = CropFlip([0.5] * 3, [0.25] * 3, padding=6, generator=generator())
    assert augment(images()).min() == -2.0  # (0 - 0.5) / 0.25


def test_a_dataloader_augments_batch_by_batch():
    data = ImageTensors(images(), torch.arange(40) % 4, list("abcd"))
    augment = CropFlip([0.0] * 3, [1.0] * 3, padding=1, flip=0.0, generator=generator())
    batches = list(DataLoader(data, 16, collate_fn=augment.collate))
    assert [len(labels) for _, labels in batches] == [16, 16, 8]
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.labels)
    for crop, (image, _) in zip(torch.cat([x for x, _ in batches]), data, strict=True):
        assert where_from(crop, image, 1)


def test_misfits_are_refused():
    with pytest.raises(DataError, match="3 channels"):
        normalise(images(), [0.5], [0.2])
    with pytest.raises(DataError, match="positive"):
        normalise(images(), [0.5] * 3, [0.2, 0.0, 0.2])
    with pytest.raises(ConfigError, match="padding"):
        random_crop(images(), -1, None)
    with pytest.raises(ConfigError, match="probability"):
        random_flip(images(), 2.0, None)
    with pytest.raises(DataError, match="uint8"):
        channel_stats(images(4, torch.float32))
