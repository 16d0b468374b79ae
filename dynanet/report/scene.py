"""A scene: an image in which every pixel is a sample, with maps of predictions and compute."""

from dataclasses import dataclass

import numpy as np

from dynanet.core.errors import DataError


@dataclass(frozen=True, eq=False)
class SceneMaps:
    """The maps of an image of H x W pixels, at one budget.

    Attributes:
        colour: (H, W, 3) uint8, a picture in true colours.
        predicted: (H, W) int, the predicted class of every pixel.
        spent: (H, W) float, MACs of every pixel as a share of the full model's.
        truth: (H, W) int, the known class; negative: unlabelled.
        tested: (H, W) bool, the labelled pixels used for neither training nor calibration; None: all labelled ones.
        colours: (C, 3) uint8 of the classes; None: `colours.class_colours`.
        about: the sensor, the place, the size of a pixel; the page adds the number of pixels.
    """

    colour: np.ndarray
    predicted: np.ndarray
    spent: np.ndarray
    truth: np.ndarray
    tested: np.ndarray | None = None
    colours: np.ndarray | None = None
    about: str = ""

    @property
    def labelled(self) -> np.ndarray:
        """The pixels with a known class, (H, W) bool."""
        return self.truth >= 0

    @property
    def checked(self) -> np.ndarray:
        """The labelled test pixels, (H, W) bool."""
        return self.labelled if self.tested is None else self.labelled & self.tested

    def check(self, classes: int) -> None:
        """Check the maps against each other and against the number of classes.

        Raises:
            DataError: maps of different sizes, classes without a name, compute that is negative or not finite, a
                picture of another shape or dtype.
        """
        size = self.truth.shape
        if len(size) != 2 or 0 in size:
            raise DataError(f"the ground truth of a scene must have shape (height, width), got {size}")
        for name in ("predicted", "spent", "tested"):
            value = getattr(self, name)
            if value is not None and value.shape != size:
                raise DataError(f"the scene's {name} map must have the shape of its truth, {size}; got {value.shape}")
        if self.colour.shape != (*size, 3) or self.colour.dtype != np.uint8:
            got = f"{self.colour.dtype} of shape {self.colour.shape}"
            raise DataError(f"the scene's picture must be uint8 of shape {(*size, 3)}, got {got}")
        low = int(self.predicted.min())
        high = int(max(self.predicted.max(), self.truth.max()))
        if low < 0 or high >= classes:
            raise DataError(f"got {classes} class names for a scene with classes from {low} to {high}")
        if not np.isfinite(self.spent).all() or (self.spent < 0).any():
            raise DataError("the compute of a scene must be shares of the full model's MACs, finite and not negative")
        if self.colours is not None and (self.colours.shape != (classes, 3) or self.colours.dtype != np.uint8):
            raise DataError(f"class colours must be uint8 of shape {(classes, 3)}, got shape {self.colours.shape}")


@dataclass(frozen=True)
class SceneShare:
    """A part of a scene: its number of pixels, mean share of the full MACs, and accuracy (None: not known)."""

    name: str
    pixels: int
    spent: float
    right: float | None


def where_in_scene(scene: SceneMaps) -> tuple[SceneShare, ...]:
    """Compute and accuracy by part: edges and insides of fields, unlabelled pixels, correct and wrong answers."""
    right = scene.predicted == scene.truth
    edge = scene.labelled & _at_an_edge(scene.truth)
    groups = {
        "whole scene": np.ones_like(right),
        "unlabelled": ~scene.labelled,
        "labelled, at the edge of a field": edge,
        "labelled, inside a field": scene.labelled & ~edge,
        "test, correct": scene.checked & right,
        "test, wrong": scene.checked & ~right,
    }
    found = []
    for name, where in groups.items():
        if where.any():
            new = where & scene.checked
            known = name.startswith("labelled") and new.any()
            share = float(right[new].mean()) if known else None
            found.append(SceneShare(name, int(where.sum()), float(scene.spent[where].mean()), share))
    return tuple(found)


def _at_an_edge(labels: np.ndarray) -> np.ndarray:
    """The pixels with another label among their eight neighbours, (H, W) bool."""
    around = np.pad(labels, 1, mode="edge")
    height, width = labels.shape
    shifted = [around[r : r + height, c : c + width] for r in range(3) for c in range(3)]
    return np.logical_or.reduce([each != labels for each in shifted])
