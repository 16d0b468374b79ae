"""What the sets of labelled images share: a held-out part, standardisation, and augmentation."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from dynanet.core.errors import MissingSplitError
from dynanet.data.augment import CropFlip, channel_stats
from dynanet.data.deviations import warn_of_constants
from dynanet.data.images import Images, ImageTensors
from dynanet.data.labels import check_parts
from dynanet.data.splits import hold_out
from dynanet.datamodules.inputs import ImageInputs
from dynanet.datamodules.module import DataModule, Opened
from dynanet.train.batches import Batches


@dataclass(eq=False)
class SplitImagesDataModule(DataModule, ABC):
    """Labelled images in the splits train, test and maybe val, which `load` reads by name.

    Args:
        place: where the images are.
        hold_out: training images to hold out for calibration; None: the validation split, or a tenth without one.
        seed: draws the images to hold out.
        size: side that images are cut and resized to; None: as they are.
    """

    place: str
    hold_out: int | None = None
    seed: int = 0
    size: int | None = None

    @abstractmethod
    def load(self, split: str, size: tuple[int, int] | None) -> Images:
        """Read a split.

        Args:
            split: its name.
            size: (height, width) to resize to.

        Raises:
            MissingSplitError: the set does not have it.
        """

    def setup(self) -> Opened:
        """Read all images into memory; a crop moves training images by up to an eighth of their side."""
        size = None if self.size is None else (self.size, self.size)
        train, test = (self.load(split, size).to_memory() for split in ("train", "test"))
        train, held_out, how = self._with_held_out(train, size)
        kind = type(self).__name__.removesuffix("DataModule").lower()
        return labelled_images(
            f"{Path(self.place).name} ({kind}), {how}", train, held_out, test,
            batch=self.batch, seed=self.shuffle_seed, crop=max(1, test.images.shape[-1] // 8), flip=0.5,
        )  # fmt: skip

    def _with_held_out(
        self, train: ImageTensors, size: tuple[int, int] | None
    ) -> tuple[ImageTensors, ImageTensors, str]:
        """The images to train with, those held out, and where these come from."""
        count = self.hold_out
        if count is None:
            try:
                return train, self.load("val", size).to_memory(), "with its validation split"
            except MissingSplitError:
                count = max(1, len(train) // 10)
        train, held_out = hold_out(train, count, seed=self.seed)
        return train, held_out, f"{count} training images held out, seed {self.seed}"


def labelled_images(
    title: str, train: ImageTensors, held_out: ImageTensors, test: ImageTensors, *, batch: int, seed: int,
    crop: int, flip: float,
) -> Opened:  # fmt: skip
    """Images with a class each, standardised by the training part; training images are cropped and mirrored at random.

    Args:
        title: of the data.
        train: training images.
        held_out: for calibration.
        test: for the final figures.
        batch: training samples per step.
        seed: of order and augmentation.
        crop: pixels that a crop moves at most.
        flip: probability of mirroring.

    Raises:
        DataError: a part has classes that training does not have, or in another order.
    """
    parts = {"held-out": held_out, "test": test}
    check_parts(train.classes, {name: (part.classes, part.labels) for name, part in parts.items()})
    mean, std = channel_stats(train.images)
    warn_of_constants(train.images, {name: part.images for name, part in parts.items()})
    augment = CropFlip(mean, std, padding=crop, flip=flip)
    plain = CropFlip(mean, std, padding=0, flip=0.0)
    _, channels, height, width = train.images.shape
    return Opened(
        title=title,
        classes=train.classes,
        inputs=ImageInputs(channels, (height, width), tuple(mean.tolist()), tuple(std.tolist())),
        train=Batches(train, batch, shuffle=True, drop_last=True, seed=seed, collate=augment.collate),
        held_out=Batches(held_out, 256, collate=plain.collate),
        test=Batches(test, 256, collate=plain.collate),
    )
