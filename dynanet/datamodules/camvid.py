"""Segmentation of street scenes: CamVid, and other data in SegNet's layout."""

from dataclasses import dataclass
from pathlib import Path

from dynanet.data.augment import channel_stats
from dynanet.data.camvid import load_camvid
from dynanet.data.deviations import warn_of_constants
from dynanet.data.segmentation import RandomResizedFlip, SegmentationTensors
from dynanet.datamodules.inputs import ImageInputs
from dynanet.datamodules.module import DataModule, Opened
from dynanet.tasks.segmentation import Segmentation
from dynanet.train.batches import Batches


@dataclass(eq=False)
class CamVidDataModule(DataModule):
    """Images with a class per pixel, in the splits train, val and test.

    Args:
        place: the folder that holds train/, trainannot/, ...; see `data.camvid.load_camvid`.
    """

    place: str

    def setup(self) -> Opened:
        """Read all images and label maps into memory."""
        train, held_out, test = (SegmentationTensors(load_camvid(self.place, split)) for split in _SPLITS)
        mean, std = channel_stats(train.images)
        warn_of_constants(train.images, {"held-out": held_out.images, "test": test.images})
        augment = RandomResizedFlip(mean, std, train.void)
        plain = RandomResizedFlip(mean, std, train.void, zoom=(1, 1), cut=1, flip=0.0)
        _, channels, height, width = train.images.shape
        return Opened(
            title=f"{Path(self.place).name}, {height} x {width} pixels, its own validation split",
            classes=train.classes,
            inputs=ImageInputs(channels, (height, width), tuple(mean.tolist()), tuple(std.tolist())),
            train=Batches(
                train, self.batch, shuffle=True, drop_last=True, seed=self.shuffle_seed, collate=augment.collate
            ),
            held_out=Batches(held_out, 8, collate=plain.collate),
            test=Batches(test, 8, collate=plain.collate),
            task=Segmentation(len(train.classes), train.void),
        )


_SPLITS = ("train", "val", "test")
