"""A data module of one's own, in the table of data sets."""

from dataclasses import dataclass

import pytest
import torch

from dynanet.data.images import ImageTensors
from dynanet.datamodules import DATA_MODULES, DataModule
from dynanet.datamodules.images import labelled_images


@dataclass(eq=False)
class Stripes(DataModule):
    """Images with a bright row or a bright column."""

    hold_out: int | None = None
    size: int | None = None

    def setup(self):
        side = self.size or 6
        labels = torch.arange(48) % 2
        images = torch.zeros(48, 1, side, side, dtype=torch.uint8)
        images[labels == 0, :, 2] = 200
        images[labels == 1, :, :, 2] = 200
        train, held_out, test = (
            ImageTensors(images[rows], labels[rows], ("row", "column"))
            for rows in (slice(0, 32), slice(32, 40), slice(40, 48))
        )
        return labelled_images(
            f"stripes, {self.hold_out} held out", train, held_out, test,
            batch=self.batch, seed=self.shuffle_seed, crop=0, flip=0,
        )  # fmt: skip


@pytest.fixture
def stripes(monkeypatch):
    monkeypatch.setitem(DATA_MODULES, "stripes", Stripes)
    return Stripes
