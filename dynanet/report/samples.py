"""Single samples that say something: the easiest, the hardest, and the surest mistakes."""

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
        answer: the class it was given.
        full: the class that the full model gives it.
    """

    row: int
    exit: int
    spent: float
    label: int
    answer: int
    full: int


@dataclass(frozen=True, eq=False)
class Samples:
    """What can be shown of N test samples, in the table's order. All of it may be left out.

    Attributes:
        pictures: (N, H, W) or (N, H, W, 3) uint8.
        spectra: (N, bands).
        wavelengths_nm: (bands,), in any order; needed with spectra.
        unit: of the spectra.
        positions: (N, 2) row and column in the scene.
        names: (N,) file names, say.
    """

    pictures: np.ndarray | None = None
    spectra: np.ndarray | None = None
    wavelengths_nm: np.ndarray | None = None
    unit: str = ""
    positions: np.ndarray | None = None
    names: Sequence[str] | None = None

    def check(self, samples: int, scene: SceneMaps | None) -> None:
        """Compare with the table and the scene.

        Raises:
            DataError: another number of samples, spectra without wavelengths, pictures that are no pictures, positions
                outside the scene.
        """
        for name in ("pictures", "spectra", "positions", "names"):
            value = getattr(self, name)
            if value is not None and len(value) != samples:
                raise DataError(f"{len(value)} {name} for {samples} test samples; give one for each, in their order")
        if self.pictures is not None and not (
            self.pictures.dtype == np.uint8
            and (self.pictures.ndim == 3 or (self.pictures.ndim == 4 and self.pictures.shape[-1] == 3))
        ):
            said = f"{self.pictures.dtype} of shape {self.pictures.shape}"
            raise DataError(f"pictures are {said}; give uint8 of shape (N, H, W) or (N, H, W, 3)")
        if self.spectra is not None:
            bands = self.spectra.shape[1:]
            nm = None if self.wavelengths_nm is None else np.shape(self.wavelengths_nm)
            if len(bands) != 1 or bands[0] < 2 or nm != bands:
                said = f"spectra of shape {self.spectra.shape} with wavelengths of shape {nm}"
                raise DataError(f"{said}; give (N, bands), two bands at least, and (bands,)")
        if self.positions is not None and scene is not None:
            height, width = scene.truth.shape
            if (self.positions < 0).any() or (self.positions >= [height, width]).any():
                raise DataError(f"positions of samples lie outside the scene of {height} x {width} pixels")


def easiest(test: ExitTable, exits: np.ndarray) -> tuple[Sample, ...]:
    """Those that leave first, the surest before the others; few of a class."""
    return _few(test, exits, _from_easy_to_hard(test, exits))


def hardest(test: ExitTable, exits: np.ndarray) -> tuple[Sample, ...]:
    """Those that leave last, the least sure before the others; few of a class."""
    return _few(test, exits, _from_easy_to_hard(test, exits)[::-1])


def surest_mistakes(test: ExitTable, exits: np.ndarray) -> tuple[Sample, ...]:
    """Wrong answers, those first that left first and were the surest; few of a class."""
    order = _from_easy_to_hard(test, exits)
    return _few(test, exits, order[~test.correct[order, exits[order]]])


def usual_spectra(shown: Samples, labels: np.ndarray, classes: int) -> np.ndarray | None:
    """(C, bands), the mean spectrum of every class, NaN where it has no sample; None: no spectra."""
    if shown.spectra is None:
        return None
    means = np.full((classes, shown.spectra.shape[1]), np.nan)
    for c in np.unique(labels):
        means[c] = shown.spectra[labels == c].mean(0)
    return means


def _from_easy_to_hard(test: ExitTable, exits: np.ndarray) -> np.ndarray:
    """(N,) rows by exit, then by falling score there; the last exit has none, so the one before it speaks."""
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
