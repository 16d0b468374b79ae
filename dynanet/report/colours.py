"""Colour scales that stay ordered and distinguishable for colour-blind readers.

Computed in Oklab (Ottosson 2020, https://bottosson.github.io/posts/oklab), where equal distances look equal. Dichromats
are simulated with the matrices of Machado, Oliveira and Fernandes (2009), doi:10.1109/TVCG.2009.113.
"""

from functools import cache

import numpy as np

_TO_CONES = np.array([
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
])  # fmt: skip
_TO_LAB = np.array([
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
])  # fmt: skip
_EYES = np.array([
    np.eye(3),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],  # no red cone
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],  # no green cone
])  # fmt: skip
_WEIGHTS = np.array([0.5, 1, 1])  # of distances: with normal vision, classes must differ twice as much
_PAPERS = np.array([[255, 255, 255], [20, 23, 27]])  # of page.css, light and dark
_ROUNDS = 10  # of improving class colours
_IMPROVED = 40  # classes; with more, colours cannot differ enough anyway


@cache
def ramp(steps: int) -> np.ndarray:
    """A scale from dark blue over green to yellow with evenly rising lightness, (steps, 3) uint8."""
    way = np.linspace(0, 1, steps)
    lightness = 0.28 + 0.62 * way
    hue = np.radians(280 - 172 * way)
    lab = np.stack([lightness, *_inside_gamut(lightness, 0.15, hue)], -1)
    return np.round(255 * _encoded(_linear(lab))).clip(0, 255).astype(np.uint8)


@cache
def class_colours(classes: int) -> np.ndarray:
    """Colours of maximal difference for normal and for colour-blind vision, (classes, 3) uint8.

    Greedy choice with a repulsion between colours, in which the closest pair counts most, then coordinate descent. None
    is near grey, which marks pixels without a class, or near the backgrounds of the page, light and dark.
    """
    rgb = _candidates()
    seen = _seen(rgb)
    everywhere = np.sum([0.2 * _repulsion(seen, paper) for paper in _seen(_decoded(_PAPERS / 255))], 0)
    chosen = [int(np.argmin(np.abs(seen[:, 0] - [0.5, -0.02, -0.16]).sum(-1)))]  # start from a blue
    forces = [_repulsion(seen, seen[chosen[0]])]
    total = everywhere + forces[0]
    while len(chosen) < classes:
        chosen.append(int(total.argmin()))
        forces.append(_repulsion(seen, seen[chosen[-1]]))
        total = total + forces[-1]
    for _ in range(_ROUNDS if classes <= _IMPROVED else 0):  # each moves to the minimum of the others' repulsion
        before = list(chosen)
        for i in range(classes):
            chosen[i] = int(np.sum([everywhere, *forces[:i], *forces[i + 1 :]], 0).argmin())
            forces[i] = _repulsion(seen, seen[chosen[i]])
        if chosen == before:
            break
    return np.round(255 * _encoded(rgb[chosen])).astype(np.uint8)


def distances(colours: np.ndarray, *, blind: bool = True) -> np.ndarray:
    """Perceived differences between colours (n, 3) uint8, (n, n); 0.02 is just visible.

    Args:
        colours: to compare.
        blind: the smallest difference over normal and colour-blind vision; else that of normal vision.
    """
    seen = _seen(_decoded(colours / 255))
    each = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    return each.min(-1) if blind else each[..., 0]


def css(colour: np.ndarray) -> str:
    """A colour (3,) uint8 as a CSS hex code."""
    return "#" + "".join(f"{int(channel):02x}" for channel in colour)


def ink(colour: np.ndarray) -> str:
    """The readable text colour, black or white, on a colour (3,) uint8."""
    return "#000000" if _decoded(colour / 255) @ [0.2126, 0.7152, 0.0722] > 0.18 else "#ffffff"


def _candidates() -> np.ndarray:
    """Displayable colours from dark to light in every hue, not near grey, (n, 3) linear RGB."""
    hues, chromas = np.radians(np.arange(0, 360, 10)), np.arange(0.08, 0.29, 0.04)
    lightness, chroma, hue = (axis.ravel() for axis in np.meshgrid(np.linspace(0.34, 0.92, 14), chromas, hues))
    rgb = _linear(np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], -1))
    fits = ((rgb > -1e-3) & (rgb < 1 + 1e-3)).all(-1)
    return rgb[fits].clip(0, 1)


def _seen(rgb: np.ndarray) -> np.ndarray:
    """Linear RGB (n, 3) in Oklab as seen with every kind of vision, (n, kinds, 3)."""
    return np.stack([_lab((rgb @ eye.T).clip(0, 1)) for eye in _EYES], 1)


def _repulsion(seen: np.ndarray, one: np.ndarray) -> np.ndarray:
    """The repulsion of colours (n, kinds, 3) by one (kinds, 3), by the vision that separates them least, (n,)."""
    apart = (_WEIGHTS * np.linalg.norm(seen - one, axis=-1)).min(1)
    return np.maximum(apart, 1e-3) ** -12.0


def _inside_gamut(lightness: np.ndarray, chroma: float, hue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both colour axes of Oklab at a chroma, or at the largest chroma that can be displayed."""
    low = np.zeros_like(hue)
    high = np.full_like(hue, chroma)
    for _ in range(20):
        middle = (low + high) / 2
        rgb = _linear(np.stack([lightness, middle * np.cos(hue), middle * np.sin(hue)], -1))
        fits = ((rgb >= 0) & (rgb <= 1)).all(-1)
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return low * np.cos(hue), low * np.sin(hue)


def _lab(rgb: np.ndarray) -> np.ndarray:
    return np.cbrt(rgb @ _TO_CONES.T) @ _TO_LAB.T


def _linear(lab: np.ndarray) -> np.ndarray:
    return (lab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_CONES).T


def _encoded(rgb: np.ndarray) -> np.ndarray:
    rgb = rgb.clip(0, 1)
    return np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)


def _decoded(rgb: np.ndarray) -> np.ndarray:
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
