import torch

from dynanet.data.patch_augment import RotatePaste


def test_the_centre_pixel_is_never_touched():
    x = torch.randn(64, 3, 9, 9)
    for chance in (0.0, 1.0):
        assert torch.equal(RotatePaste(chance)(x)[:, :, 4, 4], x[:, :, 4, 4])


def test_without_pasting_a_patch_keeps_its_own_pixels():
    x = torch.randn(32, 2, 7, 7)
    y = RotatePaste(0.0)(x)
    assert torch.equal(y.flatten(2).sort(2).values, x.flatten(2).sort(2).values)
    assert not torch.equal(y, x)


def test_pasting_brings_in_pixels_of_other_patches():
    x = torch.arange(16.0)[:, None, None, None].expand(16, 1, 9, 9)  # a patch is its number everywhere
    y = RotatePaste(1.0)(x)
    foreign = (y != x).flatten(1).float().mean(1)
    assert foreign.max() > 0.2 and foreign.max() < 0.5  # a half-plane that leaves the centre out


def test_the_global_generator_decides():
    x = torch.randn(8, 2, 9, 9)
    torch.manual_seed(3)
    first = RotatePaste()(x)
    torch.manual_seed(3)
    assert torch.equal(RotatePaste()(x), first)
