"""Parquet files in the Hugging Face hub's schema for image classification."""

from dataclasses import dataclass

from dynanet.data.images import Images
from dynanet.data.parquet import load_parquet
from dynanet.datamodules.images import SplitImagesDataModule


@dataclass(eq=False)
class ParquetDataModule(SplitImagesDataModule):
    """Images in parquet files; `place` is a folder, a file, or hf://datasets/owner/name (see `data.parquet`)."""

    def load(self, split: str, size: tuple[int, int] | None) -> Images:
        """Read a split."""
        return load_parquet(self.place, split, size=size)
