"""The forms of inputs: images, sequences of different lengths, and sentences."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dynanet.data.ragged import Sequences, pad, trimmed
from dynanet.data.text import PADDING, UNKNOWN, Vocabulary

WORDS = "words.txt"  # the vocabulary, in the folder of a run on sentences


class InputForm(ABC):
    """What one kind of input needs of a network, a session, a bundle and a report.

    Attributes:
        varies: samples have different lengths, and so different costs.
    """

    varies: ClassVar[bool] = True

    @property
    @abstractmethod
    def arguments(self) -> dict[str, int]:
        """The arguments of a network that the inputs determine."""

    @property
    @abstractmethod
    def described(self) -> dict[str, Any] | None:
        """The fields of `export.Inputs`, for a bundle; None: a bundle cannot describe the inputs."""

    @abstractmethod
    def example(self, rows: int) -> Tensor:
        """A batch of synthetic inputs, of the largest size that the data has."""

    @abstractmethod
    def samples(self, batches: Iterable[tuple[Any, Tensor]], count: int) -> Any:
        """The first `count` inputs of batches (x, y), in one batch."""

    @abstractmethod
    def cut(self, x: Any) -> Any:
        """A batch without the padding that all of its samples share."""

    def pictures(self, x: Any) -> np.ndarray | None:
        """A batch as uint8 pictures, (B, H, W) or (B, H, W, 3). None: the inputs cannot be shown."""
        return None

    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the images; None of other inputs."""
        return None

    def save(self, folder: Path) -> None:  # noqa: B027  (most need no file)
        """Write what `predict` needs beside the model into the folder of a run."""


@dataclass(frozen=True)
class ImageInputs(InputForm):
    """Images (B, channels, height, width) of one size.

    Attributes:
        channels: of an image.
        size: (height, width).
        mean: per channel, already subtracted; None: not standardised.
        std: per channel, already divided by.
    """

    varies: ClassVar[bool] = False
    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def arguments(self) -> dict[str, int]:
        """The channels."""
        return {"in_channels": self.channels}

    @property
    def described(self) -> dict[str, Any]:
        """Channels, size and standardisation."""
        return {"channels": self.channels, "size": self.size, "mean": self.mean, "std": self.std}

    def example(self, rows: int) -> Tensor:
        """Normal noise, the same at every call."""
        return torch.randn(rows, self.channels, *self.size, generator=torch.Generator().manual_seed(0))

    def samples(self, batches: Iterable[tuple[Any, Tensor]], count: int) -> Tensor:
        """(count, channels, height, width)."""
        return _first(batches, count)

    def cut(self, x: Tensor) -> Tensor:
        """The batch itself: images are not padded."""
        return x

    def pictures(self, x: Tensor) -> np.ndarray | None:
        """Standardisation undone; None of images with other than 1 or 3 channels."""
        if self.channels not in (1, 3):
            return None
        if self.mean is not None and self.std is not None:
            x = x * torch.tensor(self.std)[:, None, None] + torch.tensor(self.mean)[:, None, None]
        pictures = (255 * x).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return pictures[..., 0] if self.channels == 1 else pictures

    def image_size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.size


@dataclass(frozen=True)
class SequenceInputs(InputForm):
    """Sequences of different lengths, in batches of `data.ragged.Sequences`.

    Attributes:
        features: of a frame.
        longest: frames of the longest sequence.
        mean: per feature, already subtracted.
        std: per feature, already divided by.
        rate: samples per second of the sounds that the sequences were made of; None of other sequences.
    """

    features: int
    longest: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rate: int | None = None

    @property
    def arguments(self) -> dict[str, int]:
        """Features as channels, and the greatest length."""
        return {"in_channels": self.features, "longest": self.longest}

    @property
    def described(self) -> dict[str, Any]:
        """Features, standardisation and sample rate, of any length."""
        return {"channels": self.features, "mean": self.mean, "std": self.std, "rate": self.rate}

    def example(self, rows: int) -> Tensor:
        """Normal noise (rows, longest, features), the same at every call."""
        return torch.randn(rows, self.longest, self.features, generator=torch.Generator().manual_seed(0))

    def samples(self, batches: Iterable[tuple[Any, Tensor]], count: int) -> Sequences:
        """Padded to the longest sequence of the data."""
        taken: list[Tensor] = []
        for x, _ in batches:
            taken += [frames[:length] for frames, length in zip(*x, strict=True)]
            if len(taken) >= count:
                break
        return pad(taken[:count], steps=self.longest)

    def cut(self, x: Sequences) -> Sequences:
        """Without the frames that none of its sequences has."""
        return trimmed(x)


@dataclass(frozen=True)
class SentenceInputs(InputForm):
    """Sentences as the numbers of their words (B, longest), padded with 0.

    Attributes:
        longest: words that are read of a sentence.
        vocabulary: of the training sentences.
    """

    longest: int
    vocabulary: Vocabulary

    @property
    def arguments(self) -> dict[str, int]:
        """The size of the vocabulary, and the greatest length."""
        return {"vocabulary": len(self.vocabulary), "longest": self.longest}

    @property
    def described(self) -> None:
        """Nothing: the words are in the folder of the run."""
        return None

    def example(self, rows: int) -> Tensor:
        """Unknown words (rows, longest)."""
        return torch.full((rows, self.longest), UNKNOWN)

    def samples(self, batches: Iterable[tuple[Any, Tensor]], count: int) -> Tensor:
        """(count, longest)."""
        return _first(batches, count)

    def cut(self, x: Tensor) -> Tensor:
        """Without the words that none of its sentences has; at least two, as graphs of any length need."""
        return x[:, : max(2, int((x != PADDING).sum(1).max()))].contiguous()

    def save(self, folder: Path) -> None:
        """Write the vocabulary."""
        self.vocabulary.write(folder / WORDS)


def _first(batches: Iterable[tuple[Any, Tensor]], count: int) -> Tensor:
    taken: list[Tensor] = []
    for x, _ in batches:
        taken.append(x)
        if sum(len(each) for each in taken) >= count:
            break
    return torch.cat(taken)[:count].contiguous()
