"""Parquet files in the Hugging Face hub's schema for image classification."""

from dataclasses import dataclass
from pathlib import Path

from dynanet.data.images import Images
from dynanet.data.parquet import load_parquet
from dynanet.datamodules.images import labelled_images, with_held_out
from dynanet.datamodules.module import DataModule, Opened


@dataclass(eq=False)
class ParquetDataModule(DataModule):
    """Images in parquet files, in the Hugging Face hub's schema.

    Args:
        place: a folder, a file, or hf://datasets/owner/name; see `data.parquet.load_parquet`.
        hold_out: training images to hold out for calibration; None: the validation split, or a tenth without one.
        seed: draws the images to hold out.
        size: side that images are cut and resized to; None: as they are.
    """

    place: str
    hold_out: int | None = None
    seed: int = 0
    size: int | None = None

    def setup(self) -> Opened:
        """Read all images into memory; training images move by up to an eighth of their side."""
        name = f"{Path(self.place).name} (parquet)"
        title, train, held_out, test = with_held_out(self._load, name, self.hold_out, self.seed)
        crop = max(1, test.images.shape[-1] // 8)
        return labelled_images(
            title, train, held_out, test, batch=self.batch, seed=self.shuffle_seed, crop=crop, flip=0.5
        )

    def _load(self, split: str) -> Images:
        size = None if self.size is None else (self.size, self.size)
        return load_parquet(self.place, split, size=size)
