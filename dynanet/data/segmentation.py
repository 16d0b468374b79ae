"""Images with a class per pixel, all in memory, and the augmentation of whole batches of them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from dynanet.core.errors import ConfigError, DataError
from dynanet.data.annotated import first_of
from dynanet.data.augment import normalise
from dynanet.data.camvid import LabelMaps

Pair = tuple[Tensor, Tensor]


class SegmentationTensors(Dataset[Pair]):
    """Pairs (image uint8 (C, H, W), labels uint8 (H, W)) of one size.

    Args:
        data: images and label maps; see `data.images` for corrupt ones.

    Attributes:
        images: uint8 (N, C, H, W).
        maps: uint8 (N, H, W).
        classes: the classes' names.
        void: the label of pixels without a class.

    Raises:
        DataError: images of several sizes, or too many corrupt ones.
    """

    def __init__(self, data: LabelMaps) -> None:
        found = [(image, data.maps[row]) for image, row in map(data.images.__getitem__, range(len(data)))]
        sizes = {tuple(image.shape[1:]) for image, _ in found}
        if len(sizes) > 1:
            raise DataError(
                f"images of {len(sizes)} sizes ({first_of([f'{h} x {w}' for h, w in sorted(sizes)])}) cannot share a "
                f"batch; resize them to one"
            )
        self.images = torch.stack([image for image, _ in found])
        self.maps = torch.stack([labels for _, labels in found])
        self.classes = data.classes
        self.void = data.void

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, row: int) -> Pair:
        return self.images[row], self.maps[row]


class RandomResizedFlip:
    """The training augmentation: every image and its labels are zoomed, cropped and flipped, then normalised.

    Beyond its border an image is black and void. `collate` draws from torch's global generator.

    Args:
        mean: (C,) of images in [0, 1].
        std: (C,) of images in [0, 1].
        void: the label beyond the border.
        zoom: the smallest and the largest factor, before the crop.
        cut: side of the crop, which each image has at a random position, as a share of the image's side.
        flip: probability of a left-right flip.

    Raises:
        ConfigError: factors that are not positive and ascending, or shares out of range.
    """

    def __init__(
        self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, void: int, *,
        zoom: tuple[float, float] = (0.75, 1.6), cut: float = 0.7, flip: float = 0.5,
    ) -> None:  # fmt: skip
        if not 0 < zoom[0] <= zoom[1] or not 0 < cut <= 1 or not 0 <= flip <= 1:
            raise ConfigError(
                f"zoom is {zoom}, cut {cut} and flip {flip}; expected (smallest, largest) above 0, a share, and "
                f"a probability"
            )
        self.mean = mean
        self.std = std
        self.void = void
        self.zoom = zoom
        self.cut = cut
        self.flip = flip

    def __call__(self, images: Tensor, maps: Tensor) -> Pair:
        """Images (B, C, H, W) and labels (B, H, W), uint8 -> float32 (B, C, h, w) and int64 (B, h, w)."""
        if self.zoom == (1, 1) and self.cut == 1 and self.flip == 0:
            return normalise(images, self.mean, self.std), maps.long()
        count = len(images)
        low, high = self.zoom
        height, width = (max(1, round(self.cut * side)) for side in images.shape[2:])
        seen = self.cut / (low * (high / low) ** torch.rand(count))  # share of a side inside the crop
        down, across = (2 * torch.rand(2, count) - 1) * (1 - seen).abs()
        mirrored = 1 - 2 * (torch.rand(count) < self.flip).float()
        zero = torch.zeros(count)
        matrix = torch.stack([torch.stack([mirrored * seen, zero, across], 1), torch.stack([zero, seen, down], 1)], 1)
        grid = functional.affine_grid(matrix, [count, 1, height, width], align_corners=False)
        pixels = functional.grid_sample(images.float(), grid, mode="bilinear", align_corners=False) / 255
        labels = functional.grid_sample(maps[:, None].float() + 1, grid, mode="nearest", align_corners=False)[:, 0]
        labels = labels.round().long() - 1
        return normalise(pixels, self.mean, self.std), torch.where(labels < 0, self.void, labels)

    def collate(self, samples: Sequence[Pair]) -> Pair:
        """Pairs (image, labels) to an augmented batch."""
        images, maps = zip(*samples, strict=True)
        return self(torch.stack(images), torch.stack(maps))
