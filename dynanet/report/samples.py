"""Samples to show: the easiest, the hardest, and the most confident mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynanet.calibrate.table import ExitTable
from dynanet.core.errors import DataError
from dynanet.report.scene import SceneMaps

SHOWN = 6
PER_CLASS = 2


@dataclass(frozen=True)
class Sample:
    """A test sample.

    Attributes:
        row: in the table.
        exit: where it left, from 0.
        spent: as a share of the full MACs.
        label: its class.
        answer: the predicted class.
        full: the class that the full model predicts.
    """

    row: int
    exit: int
    spent: float
    label: int
    answer: int
    full: int


@dataclass(frozen=True, eq=False)
class Samples:
    """Pictures, spectra, positions and names of N test samples, in the table's order; all optional.

    Attributes:
        pictures: (N, H, W) or (N, H, W, 3) uint8.
        spectra: (N, bands).
        wavelengths_nm: (bands,), in any order; needed with spectra.
        unit: of the spectra.
        positions: (N, 2) row and column in the scene.
        names: (N,), for example file names.
    """

    pictures: np.ndarray | None = None
    spectra: np.ndarray | None = None
    wavelengths_nm: np.ndarray | None = None
    unit: str = ""
    positions: np.ndarray | None = None
    names: Sequence[str] | None = None

    def check(self, samples: int, scene: SceneMaps | None) -> None:
        """Check against the table and the scene.

        Raises:
            DataError: another number of samples, pictures of another shape or dtype, spectra without wavelengths,
                positions outside the scene.
        """
        for name in ("pictures", "spectra", "positions", "names"):
            value = getattr(self, name)
            if value is not None and len(value) != samples:
                raise DataError(f"got {len(value)} {name} for {samples} test samples; give one for each")
        if self.pictures is not None and not (
            self.pictures.dtype == np.uint8
            and (self.pictures.ndim == 3 or (self.pictures.ndim == 4 and self.pictures.shape[-1] == 3))
        ):
            got = f"{self.pictures.dtype} of shape {self.pictures.shape}"
            raise DataError(f"pictures must be uint8 of shape (N, H, W) or (N, H, W, 3), got {got}")
        if self.spectra is not None:
            bands = self.spectra.shape[1:]
            nm = None if self.wavelengths_nm is None else np.shape(self.wavelengths_nm)
            if len(bands) != 1 or bands[0] < 2 or nm != bands:
                got = f"{self.spectra.shape} and wavelengths of shape {nm}"
                raise DataError(f"spectra must be (N, bands), two bands or more, and wavelengths (bands,), got {got}")
        if self.positions is not None and scene is not None:
            height, width = scene.truth.shape
            if (self.positions < 0).any() or (self.positions >= [height, width]).any():
                raise DataError(f"positions of samples must lie inside the scene of {height} x {width} pixels")


def easiest(test: ExitTable, exits: np.ndarray) -> tuple[Sample, ...]:
    """Samples by earliest exit, then highest score; at most `PER_CLASS` of a class."""
    return _few(test, exits, _from_easy_to_hard(test, exits))


def hardest(test: ExitTable, exits: np.ndarray) -> tuple[Sample, ...]:
    """Samples by latest exit, then lowest score; at most `PER_CLASS` of a class."""
    return _few(test, exits, _from_easy_to_hard(test, exits)[::-1])


def confident_mistakes(test: ExitTable, exits: np.ndarray) -> tuple[Sample, ...]:
    """Wrong answers by earliest exit, then highest score; at most `PER_CLASS` of a class."""
    order = _from_easy_to_hard(test, exits)
    return _few(test, exits, order[~test.correct[order, exits[order]]])


def class_spectra(shown: Samples, labels: np.ndarray, classes: int) -> np.ndarray | None:
    """The mean spectrum of every class, (C, bands), NaN where it has no sample; None without spectra."""
    if shown.spectra is None:
        return None
    means = np.full((classes, shown.spectra.shape[1]), np.nan)
    for c in np.unique(labels):
        means[c] = shown.spectra[labels == c].mean(0)
    return means


def _from_easy_to_hard(test: ExitTable, exits: np.ndarray) -> np.ndarray:
    """Rows (N,) by exit, then by falling score there; at the last exit by the score of the exit before it."""
    if test.exits == 1:
        return np.arange(test.samples)
    scores = test.scores[np.arange(test.samples), np.minimum(exits, test.exits - 2)]
    return np.lexsort((-scores, exits))


def _few(test: ExitTable, exits: np.ndarray, order: np.ndarray) -> tuple[Sample, ...]:
    labels = test.labels
    assert labels is not None, "callers check"
    chosen: list[Sample] = []
    seen: dict[int, int] = {}
    for row in order.tolist():
        label = int(labels[row])
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= PER_CLASS:
            k = int(exits[row])
            spent = float((test.macs[k] if test.macs.ndim == 1 else test.macs[row, k]) / test.mean_macs[-1])
            answers = test.answers[row]
            chosen.append(Sample(row, k, spent, label, int(answers[k]), int(answers[-1])))
        if len(chosen) == SHOWN:
            break
    return tuple(chosen)
