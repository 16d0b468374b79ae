"""Standardisation where a channel has one value only: one rule for images, sequences and spectra."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

log = logging.getLogger("dynanet.data")

ROUNDING = 1e-9  # relative to the mean: what sums in double precision leave of a deviation of 0


def divisors(mean: Tensor, deviation: Tensor) -> Tensor:
    """Deviations to divide by: 1 for channels that have one value only.

    Args:
        mean: (C,) float64.
        deviation: (C,) float64, of the same values.
    """
    return deviation.where(deviation > ROUNDING * mean.abs(), 1.0)


def warn_of_constants(train: Tensor, others: Mapping[str, Tensor]) -> None:
    """Name the channels that have one value in training and several elsewhere, in a warning of `dynanet.data`.

    A network has learned nothing from such a channel, and its values are not scaled.

    Args:
        train: (N, C, ...).
        others: the other parts by name, (N, C, ...).
    """
    if not len(train):
        return
    least, most = _extremes(train[:1])
    if not bool((least == most).any()):
        return
    least, most = _extremes(train)
    constant = least == most
    for part, values in others.items():
        if len(values):
            low, high = _extremes(values)
            found = (constant & ((low != least) | (high != most))).nonzero().flatten().tolist()
            if found:
                more = f" and {len(found) - 5} more" if len(found) > 5 else ""
                log.warning(
                    "channel(s) %s%s have one value in training and others in the %s part; nothing can be learned "
                    "from them: train with data in which they vary", found[:5], more, part,
                )  # fmt: skip


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of every channel, (C,) each."""
    dims = [dim for dim in range(values.dim()) if dim != 1]
    return torch.amin(values, dims), torch.amax(values, dims)
