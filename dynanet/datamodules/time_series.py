"""Time series of the UEA and UCR archives."""

from dataclasses import dataclass
from pathlib import Path

from dynanet.core.errors import DataError
from dynanet.data.ragged import SequenceSet
from dynanet.data.splits import dealt
from dynanet.data.timeseries import load_time_series
from dynanet.datamodules.module import DataModule, Opened
from dynanet.datamodules.sequences import labelled_sequences


@dataclass(eq=False)
class TimeSeriesDataModule(DataModule):
    """A set of labelled series in its own split into training and test files; see `data.timeseries`.

    Args:
        place: what the files begin with: data/JapaneseVowels for data/JapaneseVowels_TRAIN.ts and _TEST.ts.
        hold_out: training series to hold out for calibration; None: a tenth.
        seed: draws the series to hold out.
    """

    place: str
    hold_out: int | None = None
    seed: int = 0

    def setup(self) -> Opened:
        """Read both files."""
        known, test = (load_time_series(f"{self.place}_{part}.ts") for part in ("TRAIN", "TEST"))
        if known.classes != test.classes:
            raise DataError(f"{self.place} has the classes {known.classes} in training and {test.classes} in testing")
        rows, aside = dealt(known.labels, self.hold_out, self.seed)
        train, held_out = (
            SequenceSet([known.sequences[i] for i in part], known.labels[part], known.classes) for part in (rows, aside)
        )
        title = f"{Path(self.place).name}, {len(aside)} training series held out, seed {self.seed}"
        return labelled_sequences(title, train, held_out, test, batch=self.batch, seed=self.shuffle_seed)
