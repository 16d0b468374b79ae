"""The split does not leak: shown on the real scene, and on drawn scenes in which every pixel has a value of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dynanet.core.errors import ConfigError, DataError
from dynanet.data.indian_pines import (
    CLASS_NAMES,
    PARTS,
    RGB_BANDS,
    SPLITS,
    UNLABELLED,
    IndianPines,
    PixelPatches,
    RawScene,
    gather_patches,
    load_scene,
    split_pixels,
)
from dynanet.nets.spectral import SpectralStem

pytest.importorskip("tensorly")
pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def scene():
    return load_scene()


@pytest.fixture(scope="module")
def pines(scene):
    return IndianPines(seed=0, scene=scene)


def drawn_scene(height, width, classes, seed):
    """Blocks of classes; band 0 numbers the pixels, so that a value says which pixel it comes from."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(-1, classes, (height // 4 + 1, width // 4 + 1), generator=generator)
    labels = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width].contiguous()
    labels[0, :3] = 0  # never without a label
    number = torch.arange(1, height * width + 1).reshape(1, height, width).float()
    return RawScene(torch.cat([number, torch.rand(1, height, width, generator=generator)]), labels, (500.0, 600.0))


def test_the_scene_is_the_known_one(scene):
    assert scene.cube.shape == (200, 145, 145) and scene.cube.dtype == torch.float32
    assert scene.labels.shape == (145, 145) and int((scene.labels == UNLABELLED).sum()) == 10776
    counts = torch.bincount(scene.labels[scene.labels != UNLABELLED], minlength=16).tolist()
    # Counts per class as published with the scene; they pin the order of the names.
    assert counts == [46, 1428, 830, 237, 483, 730, 28, 478, 20, 972, 2455, 593, 205, 1265, 386, 93]
    assert len(CLASS_NAMES) == 16 and len(scene.wavelengths_nm) == 200
    red, green, blue = (scene.wavelengths_nm[band] for band in RGB_BANDS)
    assert 600 < red < 680 and 520 < green < 570 and 440 < blue < 490


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_parts_are_disjoint_complete_and_hold_every_class(scene, split, seed):
    pines = IndianPines(split, seed, scene=scene)
    masks = torch.stack([pines.mask(part) for part in PARTS])
    assert torch.equal(masks.sum(0), (pines.labels != UNLABELLED).long())
    for part in PARTS:
        assert len(torch.unique(pines.targets(part))) == 16
        assert torch.equal(pines.labels[tuple(pines.positions(part).T)], pines.targets(part))
    if split != "whole_fields":  # whole fields are too few and too unequal for exact shares
        shares = masks.flatten(1).sum(1) / masks.sum()
        torch.testing.assert_close(shares, torch.tensor([0.4, 0.2, 0.4]), atol=0.01, rtol=0)


def test_whole_fields_are_never_shared(scene):
    from scipy import ndimage

    owner = split_pixels(scene.labels, "whole_fields", 0)
    classes_kept_whole = 0
    for label in range(16):
        marked, count = ndimage.label((scene.labels == label).numpy(), structure=[[1] * 3] * 3)
        if count >= 3:
            classes_kept_whole += 1
            assert all(len(owner[torch.from_numpy(marked == n)].unique()) == 1 for n in range(1, count + 1))
    assert classes_kept_whole >= 5


def test_the_same_seed_gives_the_same_split_and_another_seed_another(scene):
    for split in SPLITS:
        first, again, other = (split_pixels(scene.labels, split, seed) for seed in (3, 3, 4))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("split", ["field_cut", "whole_fields"])
def test_no_training_patch_of_the_real_scene_shows_a_pixel_of_another_part(scene, split):
    pines = IndianPines(split, 1, scene=scene)
    owners = gather_patches(pines.owner[None].float() + 1, pines.positions("train"), 9)  # 0 beyond the edge
    patches = pines.patches("train")
    for start in range(0, len(patches), 512):
        index = torch.arange(start, min(start + 512, len(patches)))
        shown = (patches.batch(index) != 0).any(1, keepdim=True)
        assert torch.equal(shown, owners[index] == 1)


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(5, 24),
    width=st.integers(5, 24),
    classes=st.integers(1, 5),
    patch=st.sampled_from([1, 3, 9]),
    split=st.sampled_from(["field_cut", "whole_fields"]),
    seed=st.integers(0, 1000),
)
def test_a_training_patch_holds_only_values_of_training_pixels(height, width, classes, patch, split, seed):
    drawn = drawn_scene(height, width, classes, seed)
    pines = IndianPines(split, seed, patch, drawn)
    values = pines.patches("train").batch(torch.arange(len(pines.patches("train"))))[:, 0].unique()
    allowed = pines.cube[0][pines.owner == 0]
    assert torch.isin(values[values != 0], allowed).all()
    # ... while the statistics come from labelled training pixels only: changing all others changes nothing.
    elsewhere = drawn.cube + 7 * (~pines.mask("train")).float()
    changed = IndianPines(split, seed, patch, drawn._replace(cube=elsewhere))
    assert torch.equal(changed.cube[:, pines.mask("train")], pines.cube[:, pines.mask("train")])


def test_standardised_over_training_pixels(pines):
    spectra = pines.cube[:, pines.mask("train")]
    torch.testing.assert_close(spectra.mean(1), torch.zeros(200), atol=1e-4, rtol=0)
    torch.testing.assert_close(spectra.std(1, correction=0), torch.ones(200), atol=1e-4, rtol=0)


def test_held_out_patches_show_the_whole_scene_and_the_leaky_split_says_so(scene, pines):
    for part in ("val", "test"):
        expected = gather_patches(pines.cube, pines.positions(part)[:64], 9)
        assert torch.equal(pines.patches(part).batch(torch.arange(64)), expected)
    leaky = IndianPines("random_pixels_leaky", 0, scene=scene)
    assert torch.equal(leaky.train_cube, leaky.cube)
    assert [name for name in SPLITS if "random" in name] == ["random_pixels_leaky"]


def test_patches_are_centred_and_zero_beyond_the_edge():
    image = torch.arange(1, 31).reshape(1, 5, 6).float()
    patch = gather_patches(image, torch.tensor([[0, 0], [2, 3]]), 3)
    assert patch[0, 0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 7, 8]]
    assert patch[1, 0].tolist() == [[9, 10, 11], [15, 16, 17], [21, 22, 23]]
    assert gather_patches(image, torch.zeros(0, 2, dtype=torch.long), 3).shape == (0, 1, 3, 3)


def test_the_spectral_stem_may_run_once_before_the_gather(pines):
    """Also at the edge of the scene and where the split hides pixels, and whatever the norms have learnt."""
    stem = SpectralStem(200, 8).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in [*stem.parameters(), *(b for b in stem.buffers() if b.is_floating_point())]:
            value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.1)
    stem.eval()
    for cube in (pines.train_cube, pines.cube):
        edge = torch.tensor([[0, 0], [0, 144], [144, 70], [3, 1]])
        positions = torch.cat([pines.positions("train")[::40], edge])
        with torch.no_grad():
            before = gather_patches(stem(cube.double()[None])[0], positions, 9)
            after = stem(gather_patches(cube.double(), positions, 9))
        torch.testing.assert_close(before, after, rtol=0, atol=1e-12)
        outside = (gather_patches(cube, positions, 9) == 0).all(1, keepdim=True).expand_as(after)
        assert (after[outside] == 0).all() and (after[~outside] > 0).any()


def test_a_dataset_of_patches(pines):
    train = pines.patches("train")
    patch, label = train[5]
    assert patch.shape == (200, 9, 9) and patch.dtype == torch.float32 and label == int(pines.targets("train")[5])
    row, column = pines.positions("train")[5]
    assert torch.equal(patch[:, 4, 4], pines.cube[:, row, column])
    assert torch.equal(train[-1][0], train[len(train) - 1][0])
    with pytest.raises(IndexError):
        train[len(train)]
    batch, labels = next(iter(DataLoader(train, batch_size=32)))
    assert torch.equal(batch, train.batch(torch.arange(32))) and torch.equal(labels, train.labels[:32])


def test_everywhere_and_rgb(pines):
    everywhere = pines.everywhere()
    assert isinstance(everywhere, PixelPatches) and len(everywhere) == 145 * 145
    assert torch.equal(everywhere.batch(torch.tensor([145 * 7 + 3]))[0, :, 4, 4], pines.cube[:, 7, 3])
    assert torch.equal(everywhere.labels, pines.labels.flatten())
    assert pines.rgb().shape == (145, 145, 3) and 0 <= pines.rgb().min() < pines.rgb().max() <= 1


def test_what_cannot_be_is_refused(scene):
    with pytest.raises(ConfigError, match="random_pixels_leaky"):
        IndianPines("random", scene=scene)
    with pytest.raises(ConfigError, match="odd"):
        IndianPines(patch=8, scene=scene)
    with pytest.raises(ConfigError, match="validation"):
        IndianPines(scene=scene).mask("validation")
    with pytest.raises(DataError, match="label"):
        split_pixels(torch.full((4, 4), UNLABELLED), "field_cut", 0)
