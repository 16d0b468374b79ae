"""A scene is an image in which every pixel is a sample, with maps of what was answered and what was spent."""

from dataclasses import dataclass

import numpy as np

from dynanet.core.errors import DataError


@dataclass(frozen=True, eq=False)
class SceneMaps:
    """The maps of an image of H x W pixels, at one budget.

    Attributes:
        colour: (H, W, 3) uint8, a picture in true colours.
        predicted: (H, W) int, the class that every pixel was given.
        spent: (H, W) float, MACs of every pixel as a share of the full model's.
        truth: (H, W) int, the known class; negative: unlabelled.
        tested: (H, W) bool, the labelled pixels that the model has neither trained nor been calibrated on; None: all
            labelled ones.
        colours: (C, 3) uint8 of the classes; None: `colours.class_colours`.
        about: the sensor, the place, the size of a pixel; the page adds how many there are.
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
        """(H, W) bool."""
        return self.truth >= 0

    @property
    def checked(self) -> np.ndarray:
        """(H, W) bool: labelled, and new to the model."""
        return self.labelled if self.tested is None else self.labelled & self.tested

    def check(self, classes: int) -> None:
        """Compare the maps with each other and with the number of classes.

        Raises:
            DataError: maps of different sizes, classes without a name, no share of the MACs, a picture of another kind.
        """
        size = self.truth.shape
        if len(size) != 2 or 0 in size:
            raise DataError(f"the ground truth of a scene has shape {size}; give (height, width)")
        for name in ("predicted", "spent", "tested"):
            value = getattr(self, name)
            if value is not None and value.shape != size:
                raise DataError(f"the scene's {name} map has shape {value.shape}, its ground truth {size}")
        if self.colour.shape != (*size, 3) or self.colour.dtype != np.uint8:
            said = f"{self.colour.dtype} of shape {self.colour.shape}"
            raise DataError(f"the scene's picture is {said}; give uint8 of shape {(*size, 3)}")
        low, high = int(self.predicted.min()), int(max(self.predicted.max(), self.truth.max()))
        if low < 0 or high >= classes:
            raise DataError(f"classes from {low} to {high} in a scene, but {classes} class names from 0 on")
        if not np.isfinite(self.spent).all() or (self.spent < 0).any():
            raise DataError("the compute of a scene must be shares of the full model's MACs: finite, none negative")
        if self.colours is not None and (self.colours.shape != (classes, 3) or self.colours.dtype != np.uint8):
            raise DataError(f"class colours of shape {self.colours.shape} for {classes} classes; give uint8 (C, 3)")


@dataclass(frozen=True)
class SceneShare:
    """Some pixels of a scene: how many, their mean share of the full MACs, their accuracy (None: not known)."""

    name: str
    pixels: int
    spent: float
    right: float | None


def where_in_scene(scene: SceneMaps) -> tuple[SceneShare, ...]:
    """Where the compute went: at edges of fields or inside, on what is known or not, on right answers or wrong ones."""
    right = scene.predicted == scene.truth
    edge = scene.labelled & _at_an_edge(scene.truth)
    groups = {
        "whole scene": np.ones_like(right),
        "unlabelled": ~scene.labelled,
        "labelled, at the edge of a field": edge,
        "labelled, inside a field": scene.labelled & ~edge,
        "test, answered right": scene.checked & right,
        "test, answered wrong": scene.checked & ~right,
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
    """(H, W) bool: one of the eight neighbours has another label."""
    around = np.pad(labels, 1, mode="edge")
    height, width = labels.shape
    shifted = [around[r : r + height, c : c + width] for r in range(3) for c in range(3)]
    return np.logical_or.reduce([each != labels for each in shifted])
