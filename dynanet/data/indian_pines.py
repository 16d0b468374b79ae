"""The Indian Pines scene: one hyperspectral image, split so that no training patch contains a pixel of another part.

AVIRIS, north-west Indiana, 12 June 1992: 145 x 145 pixels of about 20 m, 200 bands (the 220 of the sensor without those
that water absorbs), 16 classes, about half of the pixels unlabelled. The scene comes inside the `tensorly` package, so
nothing is downloaded. Data: Baumgardner, Biehl, Landgrebe (2015), doi:10.4231/R7RX991C, CC BY 3.0.

Most published figures draw training pixels at random. A 9 x 9 patch around a training pixel then contains test pixels,
and accuracies reach 95 % and more. The default split here is `field_cut`:

1. The fields of a class are its 8-connected components (42 in all).
2. A field is cut across its long axis: one end trains (40 %), the other is validation (20 %) and test (40 %). The seed
   draws which end trains, and the order of the other two.
3. Every pixel, labelled or not, belongs to the part of its nearest labelled pixel: its *owner*.
4. Training patches are cut from a cube in which the pixels of other owners are zero, as beyond the edge of the scene.

Means and deviations come from the labelled training pixels alone. Validation and test patches see the whole scene, as
they would in use. The parts share no pixel; they can be neighbours across a cut. `whole_fields` is harder: wherever
a class has three fields or more, no field is shared. `random_pixels_leaky` is the customary split.
"""

from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynanet.core.errors import ConfigError, DataError, require
from dynanet.data.deviations import divisors, warn_of_constants

CLASS_NAMES = (
    "alfalfa",
    "corn-notill",
    "corn-mintill",
    "corn",
    "grass-pasture",
    "grass-trees",
    "grass-pasture-mowed",
    "hay-windrowed",
    "oats",
    "soybean-notill",
    "soybean-mintill",
    "soybean-clean",
    "wheat",
    "woods",
    "buildings-grass-trees-drives",
    "stone-steel-towers",
)
PARTS = ("train", "val", "test")
SHARES = (0.4, 0.2, 0.4)
SPLITS = ("field_cut", "whole_fields", "random_pixels_leaky")
RGB_BANDS = (24, 15, 6)  # about 637, 548 and 459 nm: a true-colour picture
UNLABELLED = -1


class RawScene(NamedTuple):
    """A recorded image with its labels.

    Attributes:
        cube: (bands, height, width) float32, the sensor's digital numbers.
        labels: (height, width) int64, 0 to 15, and `UNLABELLED`.
        wavelengths_nm: one centre per band, approximate. Not monotone: the sensor's four spectrometers overlap.
    """

    cube: Tensor
    labels: Tensor
    wavelengths_nm: tuple[float, ...]


class IndianPines:
    """The standardised scene under one split.

    Args:
        split: one of `SPLITS`.
        seed: draws the split; the same seed gives the same one everywhere.
        patch: side of the square patches in pixels, odd.
        scene: another image with labels, for tests; None for the Indian Pines scene.

    Attributes:
        cube: (bands, height, width) float32, each band with mean 0 and deviation 1 over the labelled training pixels.
        train_cube: the same with 0 wherever the owner is not `train` (under `random_pixels_leaky`: `cube` itself).
        labels: (height, width) int64, 0 to 15, and `UNLABELLED`.
        owner: (height, width) int64, the part of each pixel, labelled or not, as an index of `PARTS`.

    Raises:
        ConfigError: an unknown split, or an even patch.
        MissingExtraError: tensorly or scipy is not installed.
    """

    def __init__(self, split: str = "field_cut", seed: int = 0, patch: int = 9, scene: RawScene | None = None) -> None:
        if patch < 1 or patch % 2 == 0:
            raise ConfigError(f"patch must be odd, as a patch has a centre pixel, got {patch}")
        raw, self.labels = _pixels() if scene is None else (scene.cube, scene.labels)
        self._scene = scene
        self.split = split
        self.seed = seed
        self.patch = patch
        self.owner = split_pixels(self.labels, split, seed)
        spectra = raw[:, self.mask("train")].double()  # (bands, N)
        mean = spectra.mean(1)
        deviation = divisors(mean, spectra.std(1, correction=0))
        known = {name: raw[:, self.mask(name)].T for name in PARTS}
        warn_of_constants(known.pop("train"), known)
        self.cube = ((raw - mean[:, None, None]) / deviation[:, None, None]).float()
        seen = torch.ones_like(self.owner) if split == "random_pixels_leaky" else self.owner == PARTS.index("train")
        self.train_cube = self.cube * seen

    @cached_property
    def wavelengths_nm(self) -> tuple[float, ...]:
        """One approximate centre per band."""
        return (load_scene() if self._scene is None else self._scene).wavelengths_nm

    def mask(self, part: str) -> Tensor:
        """Return (height, width) bool: the labelled pixels of a part."""
        if part not in PARTS:
            raise ConfigError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
        return (self.labels != UNLABELLED) & (self.owner == PARTS.index(part))

    def positions(self, part: str) -> Tensor:
        """Return (N, 2) int64: row and column of the labelled pixels of a part."""
        return self.mask(part).nonzero()

    def targets(self, part: str) -> Tensor:
        """Return (N,) int64: the classes of `positions(part)`."""
        return self.labels[self.mask(part)]

    def patches(self, part: str) -> "PixelPatches":
        """Return a part as patches with labels, from `train_cube` for training, else from `cube`."""
        cube = self.train_cube if part == "train" else self.cube
        return PixelPatches(cube, self.positions(part), self.targets(part), self.patch)

    def everywhere(self) -> "PixelPatches":
        """Return one patch per pixel of the scene, row by row; unlabelled pixels carry the label `UNLABELLED`."""
        return PixelPatches(self.cube, torch.ones_like(self.labels).nonzero(), self.labels.flatten(), self.patch)

    def rgb(self) -> Tensor:
        """Return (height, width, 3) float32 in 0..1: a true-colour picture, each channel stretched from 2 to 98 %."""
        picture = self.cube[list(RGB_BANDS)].permute(1, 2, 0)
        low, high = (torch.quantile(picture.flatten(0, 1), q, dim=0) for q in (0.02, 0.98))
        return ((picture - low) / (high - low)).clamp(0, 1)


class PixelPatches(Dataset):
    """Square patches around chosen pixels of an image, cut on access; zeros beyond its edge.

    Args:
        image: (channels, height, width).
        positions: (N, 2) int64, row and column of the centres.
        labels: (N,) int64.
        patch: side of a patch, odd.
    """

    def __init__(self, image: Tensor, positions: Tensor, labels: Tensor, patch: int = 9) -> None:
        self.positions = positions
        self.labels = labels
        self.patch = patch
        self._image = image

    @cached_property
    def _pixels(self) -> Tensor:
        # A copy of the whole image: only for patches that are looked at.
        return _padded_pixels(self._image, self.patch)

    def __len__(self) -> int:
        return self.positions.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one patch, (channels, patch, patch) float32, and its label."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"patch {index} of {len(self)}")
        return self.batch(torch.tensor([index % len(self)]))[0], int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return several patches by one gather; DataLoaders call this."""
        index = torch.as_tensor(indices)
        return list(zip(self.batch(index), self.labels[index].tolist(), strict=True))

    def batch(self, index: Tensor) -> Tensor:
        """Return the patches at `index` (B,): (B, channels, patch, patch), laid out channels last."""
        return _cut(self._pixels, self.positions[index], self.patch)


def gather_patches(image: Tensor, positions: Tensor, patch: int) -> Tensor:
    """Cut patches from an image, or from the features of a per-pixel stem; zeros beyond the edge.

    For a stem that reads single pixels and maps zero spectra to 0, `gather_patches(stem(cube), ...)` equals
    `stem(gather_patches(cube, ...))`, and runs the stem once per pixel instead of `patch**2` times.

    Args:
        image: (channels, height, width).
        positions: (N, 2) int64, row and column of the centres.
        patch: side of a patch, odd.

    Returns:
        (N, channels, patch, patch), laid out channels last.
    """
    return _cut(_padded_pixels(image, patch), positions, patch)


def load_scene() -> RawScene:
    """Load the scene from the tensorly package.

    Raises:
        MissingExtraError: tensorly is not installed.
        DataError: another version of the file in the package.
    """
    cube, labels = _pixels()
    _, wavelengths_nm = require("tensorly.datasets", "rs").load_indian_pines().ticks
    return RawScene(cube, labels, tuple(float(w) for w in wavelengths_nm))


def _pixels() -> tuple[Tensor, Tensor]:
    """The cube and the labels of `load_scene`, from tensorly's files: importing tensorly takes half a second."""
    package = find_spec("tensorly")
    origin = package.origin if package is not None else None
    folder = Path(origin or str(require("tensorly", "rs").__file__)).parent / "datasets" / "data"
    try:
        tensor = np.load(folder / "Indian_pines_corrected.npy")
        labels = np.load(folder / "Indian_pines_gt.npy")
    except (OSError, ValueError):  # another layout of the package: ask tensorly itself
        bunch = require("tensorly.datasets", "rs").load_indian_pines()
        tensor, labels = np.asarray(bunch.tensor), np.asarray(bunch.ticks[0])
    cube = np.ascontiguousarray(np.moveaxis(tensor.astype(np.float32), -1, 0))
    if cube.shape != (200, 145, 145) or labels.shape != (145, 145) or labels.max() != len(CLASS_NAMES):
        raise DataError(
            f"tensorly's Indian Pines came as a cube of {cube.shape} with labels {labels.shape} up to {labels.max()}; "
            "expected (200, 145, 145), (145, 145) and 16: install tensorly 0.9 or 0.10"
        )
    return torch.from_numpy(cube), torch.from_numpy(labels.astype(np.int64) - 1)


def split_pixels(labels: Tensor, split: str, seed: int) -> Tensor:
    """Assign every pixel of a scene to a part: training, validation or test.

    Args:
        labels: (height, width) int64, `UNLABELLED` where unknown.
        split: one of `SPLITS`.
        seed: draws the split.

    Returns:
        (height, width) int64, indices of `PARTS`. A pixel without a label has the part of the nearest labelled one.

    Raises:
        ConfigError: an unknown split.
        DataError: no pixel has a label.
    """
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    ndimage = require("scipy.ndimage", "rs")
    known = labels.numpy()
    if (known == UNLABELLED).all():
        raise DataError("no pixel of the scene has a label; a split needs labelled pixels")
    draw = np.random.default_rng(seed)
    owner = np.full(known.shape, UNLABELLED, dtype=np.int64)
    for label in range(known.max() + 1):
        marked, count = ndimage.label(known == label, structure=np.ones((3, 3)))
        fields = [np.argwhere(marked == number) for number in range(1, count + 1)]
        if split == "random_pixels_leaky" and fields:
            pixels = draw.permutation(np.concatenate(fields))
            owner[tuple(pixels.T)] = _portions(len(pixels), order=(0, 1, 2))
        elif split == "whole_fields" and count >= len(PARTS):
            for field, part in zip(fields, _deal([len(field) for field in fields], draw), strict=True):
                owner[tuple(field.T)] = part
        else:
            for field in fields:
                pixels = _along_the_long_axis(field, draw)
                owner[tuple(pixels.T)] = _portions(len(pixels), order=(0, 1, 2) if draw.random() < 0.5 else (0, 2, 1))
    nearest = ndimage.distance_transform_edt(known == UNLABELLED, return_distances=False, return_indices=True)
    return torch.from_numpy(owner[tuple(nearest)])


def _portions(count: int, order: tuple[int, int, int]) -> np.ndarray:
    """Parts of `count` consecutive pixels, in this `order`, each with its share and not empty."""
    sizes = np.floor(count * np.array(SHARES) + 0.5).astype(int)
    sizes[1:] = np.maximum(sizes[1:], 1)
    sizes[0] = count - sizes[1:].sum()
    if sizes[0] < 1:  # one or two pixels are not enough for three parts
        sizes = np.array([count, 0, 0])
    return np.repeat(order, sizes[list(order)])


def _deal(sizes: Sequence[int], draw: np.random.Generator) -> list[int]:
    """Parts of whole fields: large fields first, each to the part that lacks most of its share.

    The seed assigns the largest to training or test, as validation needs less.
    """
    parts = [0] * len(sizes)
    have = np.zeros(len(PARTS))
    for field in sorted(draw.permutation(len(sizes)), key=lambda number: -sizes[number]):
        lack = 1 - have / (np.array(SHARES) * sum(sizes))  # 1 for an empty part, so none stays empty
        tied = np.flatnonzero(lack == lack.max())
        parts[field] = int(draw.choice(tied[tied != PARTS.index("val")] if len(tied) > 1 else tied))
        have[parts[field]] += sizes[field]
    return parts


def _along_the_long_axis(field: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A field's pixels (N, 2) ordered along its principal axis, from the end that the seed draws."""
    centred = field - field.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2]
    axes = axes * np.where(axes[np.arange(len(axes)), np.abs(axes).argmax(1)] < 0, -1, 1)[:, None]  # a defined sign
    flip = -1 if draw.random() < 0.5 else 1
    rank = flip * (centred @ axes[0])
    if len(axes) > 1:
        rank = rank + 1e-3 * (centred @ axes[1])  # the minor axis, then the order of the pixels, breaks ties
    return field[np.argsort(np.round(rank, 9), kind="stable")]


def _padded_pixels(image: Tensor, patch: int) -> Tensor:
    """An image (channels, height, width) as (height + patch - 1, width + patch - 1, channels), zero-padded."""
    margin = patch // 2
    return torch.nn.functional.pad(image.permute(1, 2, 0), (0, 0, margin, margin, margin, margin)).contiguous()


def _cut(pixels: Tensor, positions: Tensor, patch: int) -> Tensor:
    """Patches (N, channels, patch, patch) from padded pixels; copying whole spectra is the fastest order."""
    _, width, channels = pixels.shape
    step = torch.arange(patch, device=pixels.device)
    corner = positions[:, 0] * width + positions[:, 1]
    index = corner[:, None, None] + step[:, None] * width + step
    rows = pixels.view(-1, channels).index_select(0, index.flatten())
    return rows.view(positions.shape[0], patch, patch, channels).permute(0, 3, 1, 2)
