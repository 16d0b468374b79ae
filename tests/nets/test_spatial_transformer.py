import pytest
import torch
from torch import nn

from dynanet.core.errors import ConfigError, InputError
from dynanet.core.macs import CountMacs
from dynanet.nets.spatial_transformer import Resize, SpatialTransformer, affine, crop, resize
from tests.nets.portable import check_alone, check_portable


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 2, 11, 7)


def transformer(channels=2, size=(5, 4)):
    localise = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * channels, 6))
    nn.init.normal_(localise[-1].weight, std=0.1)
    nn.init.normal_(localise[-1].bias, std=0.1)
    return SpatialTransformer(localise, size)


@pytest.mark.parametrize("place, corner", [((0.0, 0.0), (0, 0)), ((1.0, 1.0), (7, 4)), ((3 / 7, 0.25), (3, 1))])
def test_a_window_on_whole_pixels_is_a_copy(x, place, corner):
    down, across = corner
    window = crop(x, torch.tensor([place] * 3), (4, 3))
    torch.testing.assert_close(window, x[:, :, down : down + 4, across : across + 3], atol=1e-5, rtol=1e-5)


def test_a_window_between_pixels_is_interpolated(x):
    window = crop(x, torch.tensor([[1.5 / 7, 0.5]] * 3), (4, 3))
    upper, lower = x[:, :, 1:5, 2:5], x[:, :, 2:6, 2:5]
    torch.testing.assert_close(window, (upper + lower) / 2, atol=1e-5, rtol=1e-5)


def test_every_row_has_its_own_place(x):
    places = torch.rand(3, 2)
    windows = crop(x, places, 4)
    for i in range(3):
        torch.testing.assert_close(windows[i : i + 1], crop(x[i : i + 1], places[i : i + 1], 4))


@pytest.mark.parametrize(
    "size, around",
    [((13, 7), (0, 0, 1, 1)), ((16, 9), (1, 1, 3, 2)), ((11, 10), (2, 1, 0, 0)), ((12, 7), (0, 0, 1, 0))],
)
def test_an_image_smaller_than_the_window_lies_in_its_middle(x, size, around):
    """Wherever the window was wanted: zeros (left, right, up, down) around."""
    window = crop(x, torch.tensor([[0.0, 0.3], [0.2, 1.0], [1.0, 0.0]]), size)
    torch.testing.assert_close(window, nn.functional.pad(x, around), atol=1e-5, rtol=1e-5)


def test_the_gradient_moves_the_window_to_what_is_sought():
    """A white disc on black; brighter is better, and the window finds it."""
    at = torch.arange(24.0)
    image = (-((at[:, None] - 15) ** 2 + (at - 8) ** 2) / 40).exp()[None, None]
    place = torch.tensor([[0.4, 0.4]], requires_grad=True)
    for _ in range(60):
        (gradient,) = torch.autograd.grad(crop(image, place, 8).sum(), place)
        place = (place + 0.01 * gradient / gradient.norm()).detach().requires_grad_(True)
    corner = place.detach() * 16
    torch.testing.assert_close(corner, torch.tensor([[15 - 3.5, 8 - 3.5]]), atol=0.8, rtol=0)  # flat for a pixel


def test_the_gradients_of_both_are_those_of_finite_differences(x):
    image, place = x[:, :, :6, :5].double().requires_grad_(True), torch.rand(3, 2).double().requires_grad_(True)
    torch.autograd.gradcheck(lambda i, p: crop(i, p, (3, 2)), (image, place))
    theta = torch.tensor([[0.53, 0.21, 0.07], [-0.13, 0.61, 0.09]]).double().repeat(3, 1, 1).requires_grad_(True)
    torch.autograd.gradcheck(lambda i, t: affine(i, t, (3, 2)), (image, theta))


def test_the_identity_shows_the_whole_image_and_a_mirror_mirrors(x):
    identity = torch.eye(2, 3).expand(3, 2, 3)
    torch.testing.assert_close(affine(x, identity, (11, 7)), x, atol=1e-5, rtol=1e-5)
    mirror = identity * torch.tensor([[-1.0], [1.0]])
    torch.testing.assert_close(affine(x, mirror, (11, 7)), x.flip(3), atol=1e-5, rtol=1e-5)
    quarter = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]).expand(3, 2, 3)
    square = x[:, :, :7]
    torch.testing.assert_close(affine(square, quarter, 7), square.rot90(-1, (2, 3)), atol=1e-5, rtol=1e-5)


def test_torch_samples_the_same_grid(x):
    theta = torch.randn(3, 2, 3)
    grid = nn.functional.affine_grid(theta, [3, 2, 5, 4], align_corners=False)
    expected = nn.functional.grid_sample(x, grid, align_corners=False)
    torch.testing.assert_close(affine(x, theta, (5, 4)), expected, atol=1e-5, rtol=1e-5)


def test_an_untrained_transformer_shows_the_image(x):
    model = transformer(size=(11, 7))
    nn.init.zeros_(model.localise[-1].weight)
    nn.init.zeros_(model.localise[-1].bias)
    torch.testing.assert_close(model(x), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 200])
def test_the_cost_is_the_answers_whatever_the_image(channels):
    for side in (3, 64):
        with CountMacs() as count:
            crop(torch.zeros(2, channels, side, side), torch.rand(2, 2), (6, 5))
        assert count.total == 2 * 4 * channels * 6 * 5
    with CountMacs() as count:
        transformer(channels)(torch.zeros(2, channels, 9, 9))
    assert count.total == 2 * (4 * channels * 5 * 4 + 9 * channels * 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(x, dtype):
    whole = crop(x, torch.rand(3, 2), 5)
    assert crop(x.to(dtype), torch.rand(3, 2).to(dtype), 5).dtype == dtype
    place = torch.tensor([[0.5, 0.25]] * 3)
    torch.testing.assert_close(crop(x.to(dtype), place, 5).float(), crop(x, place, 5), atol=0.03, rtol=0.03)
    assert resize(x.to(dtype), 5).dtype == dtype and whole.shape == (3, 2, 5, 5)


def test_resizing_keeps_means_and_its_own_size(x):
    assert resize(x, (11, 7)) is x
    flat = torch.full((2, 1, 9, 13), 3.0)
    for size in (4, 20, (5, 31)):
        torch.testing.assert_close(resize(flat, size), flat.new_full((2, 1, *Resize(size).size), 3.0))
    halved = resize(x[:, :, :10, :6], (5, 3))
    assert halved.std() < x.std()  # smoothed, not picked


@pytest.mark.parametrize("layer", [transformer, lambda: Resize((5, 9))], ids=["transformer", "resize"])
def test_it_is_portable(layer, x):
    check_portable(layer(), x)


def test_rows_alone_and_none_of_them(x):
    check_alone(transformer(), x)
    assert crop(x[:0], torch.rand(0, 2), 4).shape == (0, 2, 4, 4)
    assert resize(x[:0], 4).shape == (0, 2, 4, 4)


@pytest.mark.parametrize("size", [0, -3, 2.5, (3,), (3, 4, 5), (3, 0), True, "ab"])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ConfigError, match="size must be"):
        Resize(size)


def test_a_localisation_of_another_shape_is_refused(x):
    with pytest.raises(InputError, match=r"\(3, 2\).*expected \(B, 6\)"):
        SpatialTransformer(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 4)(x)
