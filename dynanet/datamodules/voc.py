"""Detection data in Pascal VOC's layout."""

from dataclasses import dataclass
from pathlib import Path

import torch

from dynanet.core.errors import ConfigError, MissingSplitError
from dynanet.data.augment import channel_stats
from dynanet.data.detection import DetectionTensors, Normalize, RandomResizedFlipBoxes, to_memory
from dynanet.data.deviations import warn_of_constants
from dynanet.data.voc import load_voc
from dynanet.datamodules.inputs import ImageInputs
from dynanet.datamodules.module import DataModule, Opened
from dynanet.tasks.detection.task import Detection
from dynanet.train.batches import Batches


@dataclass(eq=False)
class VOCDataModule(DataModule):
    """Images with boxes, in the lists train, test and maybe val.

    Args:
        place: the folder that holds JPEGImages, Annotations and ImageSets; see `data.voc.load_voc`.
        hold_out: training images to hold out for calibration; None: the validation list, or a tenth without one.
        seed: draws the images to hold out.
        size: height that images are resized to, the width in the shape of the first one; None: as they are.
    """

    place: str
    hold_out: int | None = None
    seed: int = 0
    size: int | None = None

    def setup(self) -> Opened:
        """Read all images and boxes into memory."""
        size = self._shape()
        train, test = (to_memory(load_voc(self.place, split), size) for split in ("train", "test"))
        _, channels, height, width = test.images.shape
        name = f"{Path(self.place).name}, {height} x {width} pixels"
        train, held_out, how = self._with_held_out(train, size)
        mean, std = channel_stats(train.images)
        warn_of_constants(train.images, {"held-out": held_out.images, "test": test.images})
        augment, plain = RandomResizedFlipBoxes(mean, std), Normalize(mean, std)
        return Opened(
            title=f"{name}, {how}",
            classes=train.classes,
            inputs=ImageInputs(channels, (height, width), tuple(mean.tolist()), tuple(std.tolist())),
            train=Batches(
                train, self.batch, shuffle=True, drop_last=True, seed=self.shuffle_seed, collate=augment.collate
            ),
            held_out=Batches(held_out, 8, collate=plain.collate),
            test=Batches(test, 8, collate=plain.collate),
            task=Detection(tuple(train.classes)),
        )

    def _shape(self) -> tuple[int, int] | None:
        """(height, width), in the shape of the first training image."""
        if self.size is None:
            return None
        image, _ = load_voc(self.place, "train")[0]
        return self.size, max(1, round(image.shape[2] * self.size / image.shape[1]))

    def _with_held_out(
        self, train: DetectionTensors, size: tuple[int, int] | None
    ) -> tuple[DetectionTensors, DetectionTensors, str]:
        """The images to train with, those held out, and where these come from."""
        count = self.hold_out
        if count is None:
            try:
                return train, to_memory(load_voc(self.place, "val"), size), "its own validation split"
            except MissingSplitError:
                count = max(1, len(train) // 10)
        if count >= len(train):
            raise ConfigError(f"data.held_out is {count}, and there are {len(train)} training images; hold out fewer")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))
        how = f"{count} training images held out, seed {self.seed}"
        return train.part(order[count:]), train.part(order[:count]), how
