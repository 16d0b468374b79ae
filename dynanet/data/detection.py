"""Images with boxes in memory, at one size, and the augmentation of whole batches of them.

The boxes of a batch are one tensor (B, M, 5): label, left, top, right, bottom in pixels. Rows of label -1 pad images
with fewer boxes; M may be 0. A difficult box of class k has the label -2 - k: losses learn from labels of 0 and more
only, and scores neither count it as missed nor its detection as wrong.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from dynanet.core.errors import ConfigError, DataError, check_sizes
from dynanet.data.augment import normalise
from dynanet.data.images import to_float
from dynanet.data.voc import Boxes, DetectionImages, reversed_corners


class DetectionTensors(Dataset[tuple[Tensor, Boxes]]):
    """Images and their boxes in memory; see `to_memory`.

    Args:
        images: uint8 (N, C, H, W).
        boxes: per image, in pixels of these images.
        classes: the classes' names.

    Raises:
        DataError: images and boxes do not match, no images, a label out of range, or a box with swapped
            corners.
    """

    def __init__(self, images: Tensor, boxes: Sequence[Boxes], classes: Sequence[str]) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(boxes) or not len(boxes):
            raise DataError(
                f"images {tuple(images.shape)} {images.dtype} with the boxes of {len(boxes)}; expected uint8 "
                f"(N, C, H, W) and boxes for each, N > 0"
            )
        for k, each in enumerate(boxes):
            if len(each.labels) and not 0 <= int(each.labels.min()) <= int(each.labels.max()) < len(classes):
                raise DataError(
                    f"image {k} has labels from {int(each.labels.min())} to {int(each.labels.max())}; expected 0 to "
                    f"{len(classes) - 1}, of the classes {', '.join(classes)}"
                )
            if bool((backwards := reversed_corners(each.boxes)).any()):
                corners = each.boxes[backwards][0].tolist()
                raise DataError(f"image {k} has the box {corners}; expected left, top, right, bottom in this order")
        self.images = images
        self.boxes = tuple(boxes)
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: int) -> tuple[Tensor, Boxes]:
        return self.images[index], self.boxes[index]

    def part(self, indices: Tensor) -> "DetectionTensors":
        """The images at these indices."""
        return DetectionTensors(self.images[indices], [self.boxes[i] for i in indices.tolist()], self.classes)


def to_memory(data: DetectionImages, size: tuple[int, int] | None = None) -> DetectionTensors:
    """Decode and resize every image once; boxes are scaled with their image.

    Images of another aspect are stretched. The next image replaces a corrupt one.

    Args:
        data: from `load_voc`, with the default transform.
        size: (height, width); None where all images have one size.

    Raises:
        ConfigError: a size below 1.
        DataError: images of several sizes, and none given.
    """
    if size is not None:
        check_sizes(size=size)
    pairs = [data[k] for k in range(len(data))]
    found = {tuple(image.shape[1:]) for image, _ in pairs}
    if size is None and len(found) > 1:
        raise DataError(f"images of {len(found)} sizes, {sorted(found)[:3]}; give size=(height, width)")
    height, width = size if size is not None else pairs[0][0].shape[1:]
    images = []
    boxes = []
    for image, (corners, labels, difficult) in pairs:
        across, down = width / image.shape[2], height / image.shape[1]
        images.append(_resized(image, (height, width)))
        boxes.append(Boxes(corners * torch.tensor([across, down, across, down]), labels, difficult))
    return DetectionTensors(torch.stack(images), boxes, data.classes)


def padded(boxes: Sequence[Boxes]) -> Tensor:
    """Boxes of several images as one tensor (B, M, 5); M is the largest number per image."""
    labels = [torch.where(b.difficult, -2 - b.labels, b.labels) for b in boxes]
    kept = [torch.cat([label[:, None].to(b.boxes), b.boxes], 1) for label, b in zip(labels, boxes, strict=True)]
    most = max((len(k) for k in kept), default=0)
    out = torch.zeros(len(kept), most, 5)
    out[..., 0] = -1
    for row, k in zip(out, kept, strict=True):
        row[: len(k)] = k
    return out


def unpadded(y: Tensor) -> list[Boxes]:
    """The boxes of every image of a batch (B, M, 5), difficult ones marked as such."""
    kept = [row[row[:, 0] != -1] for row in y]
    labels = [k[:, 0].long() for k in kept]
    return [
        Boxes(k[:, 1:], torch.where(label < 0, -2 - label, label), label < 0)
        for k, label in zip(kept, labels, strict=True)
    ]


class RandomResizedFlipBoxes:
    """The training augmentation of images with boxes: flip, zoom, shift and jitter of the light, then normalise.

    Beyond its border an image repeats its edge. Boxes of which less than `visible` remains are removed.

    Args:
        mean: (C,) of images in [0, 1].
        std: (C,) of images in [0, 1].
        zoom: images are enlarged or shrunk by up to this factor; 1 turns zooming off.
        flip: flip left-right and top-down, each with probability 1/2.
        light: contrast varies by this share, brightness by this many standard deviations.
        visible: smallest remaining share of a box.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, *, zoom: float = 1.25, flip: bool = True,
        light: float = 0.2, visible: float = 0.4,
    ) -> None:  # fmt: skip
        if zoom < 1 or not 0 <= light < 1 or not 0 <= visible <= 1:
            raise ConfigError(
                f"zoom is {zoom}, light {light} and visible {visible}; expected a zoom of at least 1, and shares"
            )
        self.mean = mean
        self.std = std
        self.zoom = zoom
        self.flip = flip
        self.light = light
        self.visible = visible

    def collate(self, samples: Sequence[tuple[Tensor, Boxes]]) -> tuple[Tensor, Tensor]:
        """Pairs (image, Boxes) to an augmented batch (B, C, H, W) and its boxes (B, M, 5)."""
        images = torch.stack([image for image, _ in samples])
        boxes = padded([each for _, each in samples])
        x = normalise(images, self.mean, self.std)
        batch = len(x)
        scale = self.zoom ** (2 * torch.rand(batch, 1) - 1)
        # Output position p shows input position scale * p + shift, both from -1 to 1; negative scales mirror.
        mirror = torch.where(torch.rand(batch, 2) < 0.5, -1.0, 1.0) if self.flip else torch.ones(batch, 2)
        shift = (2 * torch.rand(batch, 2) - 1) * (1 - 1 / self.zoom)
        scale = scale * mirror
        theta = torch.diag_embed(scale)
        grid = functional.affine_grid(torch.cat([theta, shift[..., None]], 2), list(x.shape), align_corners=False)
        x = functional.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        contrast = 1 + self.light * (2 * torch.rand(batch, 1, 1, 1) - 1)
        x = contrast * x + self.light * (2 * torch.rand(batch, 1, 1, 1) - 1)
        return x, moved(boxes, scale, shift, (x.shape[2], x.shape[3]), self.visible)


class Normalize:
    """Normalise images only: for held-out data.

    Args:
        mean: (C,) of images in [0, 1].
        std: (C,) of images in [0, 1].
    """

    def __init__(self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> None:
        self.mean, self.std = mean, std

    def collate(self, samples: Sequence[tuple[Tensor, Boxes]]) -> tuple[Tensor, Tensor]:
        """Pairs (image, Boxes) to a batch (B, C, H, W) and its boxes (B, M, 5)."""
        images = torch.stack([image for image, _ in samples])
        return normalise(images, self.mean, self.std), padded([each for _, each in samples])


def moved(y: Tensor, scale: Tensor, shift: Tensor, size: tuple[int, int], visible: float) -> Tensor:
    """Boxes in images whose position p shows the former position scale * p + shift; clipped to the image.

    Args:
        y: boxes (B, M, 5).
        scale: (B, 2) across and down; negative where mirrored.
        shift: (B, 2), in halves of the image.
        size: (height, width).
        visible: boxes of which a smaller share remains become padding.
    """
    side = torch.tensor([size[1], size[0]], dtype=y.dtype)
    corners = y[..., 1:].unflatten(-1, (2, 2)) * 2 / side - 1  # from -1 to 1
    corners = (corners - shift[:, None, None]) / scale[:, None, None]
    corners = (corners + 1) / 2 * side
    least, most = corners.amin(2), corners.amax(2)
    inside_least, inside_most = (torch.minimum(edge.clamp(min=0), side) for edge in (least, most))
    share = (inside_most - inside_least).clamp(min=0).prod(-1) / (most - least).prod(-1).clamp(min=1e-6)
    label = torch.where((share >= visible) & (share > 0), y[..., 0], -1.0)
    return torch.cat([label[..., None], inside_least, inside_most], -1)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Float (C, H, W) in [0, 1] to uint8 of another size."""
    image = image if image.is_floating_point() else to_float(image)
    if tuple(image.shape[1:]) != size:
        image = functional.interpolate(image[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    return (255 * image).round().clamp(0, 255).byte()
