"""Spoken digits: the Free Spoken Digit Dataset."""

from dataclasses import dataclass

from dynanet.data.speech import load_spoken_digits
from dynanet.datamodules.module import DataModule, Opened
from dynanet.datamodules.sequences import labelled_sequences


@dataclass(eq=False)
class SpokenDigitsDataModule(DataModule):
    """Recordings of ten digits as log-mel frames, in the official split; see `data.speech`.

    Args:
        place: the folder of the recordings.
    """

    place: str

    def setup(self) -> Opened:
        """Read all recordings."""
        train, held_out, test = (load_spoken_digits(self.place, split) for split in ("train", "val", "test"))
        title = "spoken digits, official test part, indices 5 to 9 held out"
        return labelled_sequences(title, train, held_out, test, batch=self.batch, seed=self.shuffle_seed)
