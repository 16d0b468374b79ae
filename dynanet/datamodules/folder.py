"""Folders of images, root/split/class/image."""

from dataclasses import dataclass

from dynanet.data.folder import load_folder
from dynanet.data.images import Images
from dynanet.datamodules.images import SplitImagesDataModule


@dataclass(eq=False)
class FolderDataModule(SplitImagesDataModule):
    """Images in folders; `place` is the folder that holds the splits (see `data.folder`)."""

    def load(self, split: str, size: tuple[int, int] | None) -> Images:
        """Read a split."""
        return load_folder(self.place, split, size=size)
