"""Augmentation of whole batches, fast enough for a CPU.

Every function takes images (B, C, H, W), uint8 or float, and a generator where it draws; every image is drawn for
separately. Crop before normalising, so that padding is black, as in the customary CIFAR recipe
(pad 4, crop, flip: Lee et al., "Deeply-Supervised Nets", 2015, arXiv:1409.5185, section 3.2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dynanet.core.errors import ConfigError, DataError, check_sizes
from dynanet.data.deviations import divisors
from dynanet.data.images import to_float


class CropFlip:
    """The training augmentation: random crop, random flip, then normalise.

    `DataLoader(data, batch_size, shuffle=True, collate_fn=augment.collate)` augments batch by batch.

    Args:
        mean: (C,) of images in [0, 1].
        std: (C,) of images in [0, 1].
        padding: black pixels on each side before the crop; 0 for no crop.
        flip: the probability of a left-right flip.
        generator: of random numbers; None for torch's global one, which every DataLoader worker has its own of.
    """

    def __init__(
        self,
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        *,
        padding: int = 4,
        flip: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        self.mean = mean
        self.std = std
        self.padding = padding
        self.flip = flip
        self.generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or float in [0, 1], to float32 of the same shape."""
        images = random_crop(images, self.padding, self.generator)
        return normalise(random_flip(images, self.flip, self.generator), self.mean, self.std)

    def collate(self, samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Pairs (image, label) to an augmented batch (B, C, H, W) and its labels (B,)."""
        images, labels = zip(*samples, strict=True)
        return self(torch.stack(images)), torch.tensor(labels)


def random_crop(images: Tensor, padding: int, generator: torch.Generator | None) -> Tensor:
    """Pad with zeros on every side and crop each image back to its size at a random position.

    Args:
        images: (B, C, H, W), any dtype.
        padding: pixels per side; 0 returns the images.
        generator: of random numbers on the CPU; None for torch's global one.

    Returns:
        (B, C, H, W) of the same dtype.

    Raises:
        ConfigError: the padding is negative.
    """
    check_sizes(0, padding=padding)
    if padding == 0:
        return images
    batch, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, batch), generator=generator).to(images.device)
    # All crops are a view of the padded batch, (B, C, top, left, H, W); only the chosen ones are copied.
    crops = functional.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(batch, device=images.device), :, top, left]


def random_flip(images: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Mirror each image left to right with this probability.

    Args:
        images: (B, C, H, W), any dtype.
        probability: in [0, 1].
        generator: of random numbers on the CPU; None for torch's global one.

    Returns:
        (B, C, H, W) of the same dtype.

    Raises:
        ConfigError: a probability outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ConfigError(f"probability must be from 0 to 1, got {probability}")
    flipped = torch.rand(images.shape[0], 1, 1, 1, generator=generator).to(images.device) < probability
    return torch.where(flipped, images.flip(-1), images)


def normalise(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """(x - mean) / std per channel.

    Args:
        images: (B, C, H, W) or (C, H, W), uint8 in 0..255 or float in [0, 1].
        mean: (C,) of images in [0, 1].
        std: (C,) of images in [0, 1], positive.

    Returns:
        float32 of the same shape (floats keep their dtype).

    Raises:
        DataError: not one mean and one positive deviation per channel.
    """
    images = to_float(images) if images.dtype == torch.uint8 else images
    mean, std = (torch.as_tensor(v, dtype=images.dtype, device=images.device) for v in (mean, std))
    channels = images.shape[-3]
    if mean.shape != (channels,) or std.shape != (channels,) or not bool((std > 0).all()):
        raise DataError(
            f"mean {mean.tolist()} and std {std.tolist()} for images of {channels} channels; "
            f"expected one mean and one positive deviation per channel"
        )
    return (images - mean[:, None, None]) / std[:, None, None]


def channel_stats(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all pixels of each channel, exact; deviations of 0 become 1.

    Args:
        images: uint8 (N, C, H, W); of the training part only.

    Returns:
        mean (C,) and std (C,), float32, of the images scaled to [0, 1].

    Raises:
        DataError: the images are not uint8 (N, C, H, W).
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or not images.numel():
        raise DataError(f"images {tuple(images.shape)} {images.dtype}; expected uint8 (N, C, H, W), not empty")
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares /= shares.sum(1, keepdim=True)
    mean = shares @ values
    std = ((values - mean[:, None]) ** 2 * shares).sum(1).sqrt()
    return mean.float(), divisors(mean, std).float()
