"""Sentences with labels, one per line ("3 How far is it ?"), as word ids that are padded batch by batch.

The format of the usual sentence classification sets (Kim 2014, arXiv:1408.5882): SST, TREC, MR, CR. They are tokenised:
words are separated by spaces, and read in lower case.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynanet.core.errors import DataError, check_sizes
from dynanet.core.files import write_atomically
from dynanet.data.lines import MARK, read_lines

PADDING = 0  # the id of no word
UNKNOWN = 1  # the id of a word outside the vocabulary
_DIGITS = 18  # of a label: those of int64


class TruncationWarning(UserWarning):
    """A text was longer than the limit, and was truncated."""


class Vocabulary:
    """Ids of the words that are frequent enough; 0 is padding, 1 any other word.

    Args:
        texts: training sentences.
        least: smallest number of occurrences of a word.

    Raises:
        ConfigError: `least` below 1.
    """

    def __init__(self, texts: Iterable[str], *, least: int = 1) -> None:
        check_sizes(least=least)
        counts = Counter(word for text in texts for word in words(text))
        frequent = sorted((word for word, count in counts.items() if count >= least), key=lambda w: (-counts[w], w))
        self._numbers = {word: number for number, word in enumerate(frequent, start=2)}

    def __len__(self) -> int:
        """Number of ids, padding and unknown included: the size of an embedding."""
        return 2 + len(self._numbers)

    def write(self, path: str | Path) -> None:
        """Write one word per line, in the order of their ids."""
        text = "".join(f"{word}\n" for word in self._numbers)
        write_atomically(Path(path), lambda file: file.write(text.encode()))

    @classmethod
    def read(cls, path: str | Path) -> "Vocabulary":
        """Read the file of `write`.

        Raises:
            DataError: the file cannot be read, or is not a vocabulary.
        """
        lines = read_lines(path, "a vocabulary, one word per line")
        known = lines[:-1]
        if lines[-1] or len(set(known)) < len(known) or any(words(word) != [word] for word in known):
            raise DataError(f"{path} is not a vocabulary, or damaged; expected every word once, one per line")
        found = cls([])
        found._numbers = {word: number for number, word in enumerate(known, start=2)}
        return found

    def encode(self, text: str, longest: int | None = None) -> Tensor:
        """Word ids (T,) int64, at most `longest`. A text without words is one unknown word."""
        numbers = [self._numbers.get(word, UNKNOWN) for word in words(text)[:longest]]
        return torch.tensor(numbers or [UNKNOWN])


class Sentences(Dataset[tuple[Tensor, int]]):
    """Sentences and their classes.

    Args:
        texts: sentences.
        labels: (N,) int64.
        vocabulary: of the training sentences.
        longest: number of words to which sentences are truncated.

    Warns:
        TruncationWarning: sentences of more than `longest` words were truncated.

    Raises:
        DataError: not one label per sentence.
    """

    def __init__(self, texts: Sequence[str], labels: Tensor, vocabulary: Vocabulary, *, longest: int = 128) -> None:
        if len(texts) != len(labels):
            raise DataError(f"{len(texts)} sentences and {len(labels)} labels; give one label per sentence")
        warn_of_cuts([len(words(text)) for text in texts], longest, "words")
        self.ids = [vocabulary.encode(text, longest) for text in texts]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.ids[index], int(self.labels[index])

    @staticmethod
    def collate(samples: Sequence[tuple[Tensor, int]], *, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Pairs (ids, label) to ids (B, T) padded with 0, and labels (B,).

        Args:
            samples: one or more.
            width: T; None for the longest sentence.
        """
        ids, labels = zip(*samples, strict=True)
        padded = torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True, padding_value=PADDING)
        if width is not None:
            padded = torch.nn.functional.pad(padded, (0, width - padded.shape[1]), value=PADDING)
        return padded, torch.tensor(labels)


def load_labelled_lines(path: str | Path) -> tuple[list[str], Tensor]:
    """Read sentences and labels (N,) int64 from a file of lines "label sentence", in UTF-8 or Latin-1.

    Raises:
        DataError: the file cannot be read, has no lines, or a line does not begin with the number of a class.
    """
    texts = []
    labels = []
    for number, line in enumerate(read_lines(path, "a file of labelled sentences", fallback="latin-1"), start=1):
        if not line.strip():
            continue
        label, *rest = line.split(maxsplit=1)
        if not (label.isascii() and label.isdigit() and len(label) <= _DIGITS):
            raise DataError(f"line {number} of {path} begins with {label[:20]!r}; expected the number of a class")
        texts.append(rest[0].strip() if rest else "")
        labels.append(int(label))
    if not texts:
        raise DataError(f"{path} has no sentences; expected lines such as '3 How far is it ?'")
    return texts, torch.tensor(labels)


def warn_of_cuts(lengths: Sequence[int], longest: int, of: str) -> None:
    """Warn of texts that are too long.

    Args:
        lengths: of the texts.
        longest: the limit.
        of: the unit of lengths.
    """
    long = [number for number, length in enumerate(lengths) if length > longest]
    if long:
        which = f"{long[:5]}{f' and {len(long) - 5} more' if len(long) > 5 else ''}"
        warnings.warn(
            f"text(s) {which} have more than {longest} {of} and were truncated",
            TruncationWarning,
            stacklevel=3,
        )


def words(text: str) -> list[str]:
    """Words separated by spaces, in lower case, without byte order marks."""
    return text.replace(MARK, "").lower().split()
