import pytest
import torch

from dynanet.core.errors import ConfigError, DataError
from dynanet.data.camvid import load_camvid
from dynanet.data.segmentation import RandomResizedFlip, SegmentationTensors

pil = pytest.importorskip("PIL.Image")
VOID = 11
MEAN, STD = [0.5] * 3, [0.25] * 3


def write(root, sizes):
    for folder in ("train", "trainannot"):
        (root / folder).mkdir()
    for k, (height, width) in enumerate(sizes):
        labels = (torch.arange(height * width) % 3).view(height, width).to(torch.uint8)
        pil.fromarray(labels.numpy() * 100).convert("RGB").save(root / "train" / f"{k}.png")
        pil.fromarray(labels.numpy()).save(root / "trainannot" / f"{k}.png")


def test_pairs_in_memory(tmp_path):
    write(tmp_path, [(6, 5)] * 3)
    pairs = SegmentationTensors(
        load_camvid(tmp_path, "train", transform=lambda *pair: pytest.fail("pixels as they are were asked"))
    )
    assert pairs.images.shape == (3, 3, 6, 5) and pairs.maps.shape == (3, 6, 5) and len(pairs) == 3
    image, labels = pairs[1]
    assert torch.equal(image[0], labels * 100) and image.dtype == labels.dtype == torch.uint8
    assert pairs.void == VOID and len(pairs.classes) == 11


def test_sizes_that_differ_are_told(tmp_path):
    write(tmp_path, [(6, 5), (6, 7)])
    with pytest.raises(DataError, match="2 sizes .6 x 5, 6 x 7.*resize"):
        SegmentationTensors(load_camvid(tmp_path, "train"))


def scene(count=32, height=20, width=30):
    """Labels are what the pixels say: 50 times the class."""
    maps = torch.randint(3, (count, height // 5, width // 5), generator=torch.Generator().manual_seed(0))
    maps = maps.repeat_interleave(5, 1).repeat_interleave(5, 2)
    return (maps * 50)[:, None].expand(-1, 3, -1, -1).to(torch.uint8), maps.to(torch.uint8)


def test_labels_go_where_pixels_go():
    images, maps = scene()
    torch.manual_seed(0)
    x, y = RandomResizedFlip(MEAN, STD, VOID, zoom=(0.5, 1.6))(images, maps)
    assert x.shape == (32, 3, 14, 21) and y.shape == (32, 14, 21) and y.dtype == torch.int64
    pixels = ((x[:, 0] * 0.25 + 0.5) * 255 / 50).round().long()
    inside = y != VOID
    assert (pixels == y)[inside].float().mean() > 0.8  # the rest is interpolated between fields
    assert set(y.unique().tolist()) == {0, 1, 2, VOID} and inside.float().mean() > 0.8
    assert not torch.equal(y[:16], y[16:])


def test_without_anything_to_do_they_stay():
    images, maps = scene(2)
    x, y = RandomResizedFlip(MEAN, STD, VOID, zoom=(1, 1), cut=1, flip=0.0).collate(
        list(zip(images, maps, strict=True))
    )
    torch.testing.assert_close(x, (images / 255 - 0.5) / 0.25)
    assert torch.equal(y, maps.long())


def test_a_flip_is_exact():
    images, maps = scene(3)
    x, y = RandomResizedFlip(MEAN, STD, VOID, zoom=(1, 1), cut=1, flip=1.0)(images, maps)
    torch.testing.assert_close(x, ((images / 255 - 0.5) / 0.25).flip(-1))
    assert torch.equal(y, maps.long().flip(-1))


def test_the_same_seed_draws_the_same():
    images, maps = scene(4)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(RandomResizedFlip(MEAN, STD, VOID)(images, maps))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])


@pytest.mark.parametrize("wrong", [{"zoom": (0.0, 1.0)}, {"zoom": (2.0, 1.0)}, {"cut": 0.0}, {"flip": 1.5}])
def test_what_is_refused(wrong):
    with pytest.raises(ConfigError, match="expected .smallest, largest."):
        RandomResizedFlip(MEAN, STD, VOID, **wrong)
