"""Labelled sentences: SST-2, TREC, and other sets of lines with a label and a sentence."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from dynanet.core.errors import DataError
from dynanet.data.buckets import BucketedBatches
from dynanet.data.labels import count_classes
from dynanet.data.splits import dealt
from dynanet.data.text import Sentences, Vocabulary, load_labelled_lines
from dynanet.datamodules.inputs import SentenceInputs
from dynanet.datamodules.module import DataModule, Opened
from dynanet.train.batches import Batches

Lines = tuple[list[str], Tensor]  # sentences and their labels


@dataclass(eq=False)
class SentencesDataModule(DataModule):
    """Sentences as numbers of words, by the vocabulary of the training sentences; see `data.text`.

    Args:
        place: what the files begin with: data/stsa.binary for data/stsa.binary.train, .dev and .test; or data/TREC for
            data/TREC.train.all and .test.all.
        hold_out: training sentences to hold out for calibration; None: the .dev file, or a tenth without one.
        seed: draws the sentences to hold out.
        size: words that are read of a sentence, 64 if None; the others are cut off, with a warning.
    """

    place: str
    hold_out: int | None = None
    seed: int = 0
    size: int | None = None

    def setup(self) -> Opened:
        """Read all files. Training batches are of similar lengths, the others are padded to `size`."""
        longest = 64 if self.size is None else self.size
        train, held_out, how = self._with_held_out(load_labelled_lines(self._file("train")))
        test = load_labelled_lines(self._file("test"))
        classes = count_classes(train[1])
        for part, (_, labels) in (("held-out", held_out), ("test", test)):
            if int(labels.max()) >= classes:
                raise DataError(
                    f"{self.place} has the class {int(labels.max())} in its {part} part, and training has {classes}"
                )
        vocabulary = Vocabulary(train[0], least=2)
        sets = [Sentences(*lines, vocabulary, longest=longest) for lines in (train, held_out, test)]
        buckets = BucketedBatches(sets[0], [len(ids) for ids in sets[0].ids], self.batch, self.shuffle_seed)
        plain = partial(Sentences.collate, width=longest)
        return Opened(
            title=f"{Path(self.place).name}, {how}",
            classes=[str(k) for k in range(classes)],
            inputs=SentenceInputs(longest, vocabulary),
            train=Batches(buckets, 1, shuffle=True, seed=self.shuffle_seed, collate=buckets.collate),
            held_out=Batches(sets[1], 256, collate=plain),
            test=Batches(sets[2], 256, collate=plain),
        )

    def _with_held_out(self, known: Lines) -> tuple[Lines, Lines, str]:
        """The sentences to train with, those held out, and where these come from."""
        dev = self._file("dev")
        if self.hold_out is None and dev.exists():
            return known, load_labelled_lines(dev), "its own development split"
        texts, labels = known
        rows, aside = dealt(labels, self.hold_out, self.seed)
        train, held_out = (([texts[i] for i in part], labels[part]) for part in (rows, aside))
        return train, held_out, f"{len(aside)} training sentences held out, seed {self.seed}"

    def _file(self, part: str) -> Path:
        """With or without .all at the end."""
        plain = Path(f"{self.place}.{part}")
        return plain if plain.exists() or not Path(f"{plain}.all").exists() else Path(f"{plain}.all")
