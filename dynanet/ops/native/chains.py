"""Chains of convolutions as the native kernels take them: packed weights, fused ReLUs, rows found by position."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynanet.ops.native.library import fit
from dynanet.ops.native.products import TAPS, Packed

Ready = dict[nn.Module, tuple[Tensor, Tensor | None]]


class Chain:
    """Keeps the packed weights of a chain's convolutions."""

    def __init__(self) -> None:
        self._packed: dict[nn.Module, Packed] = {}

    def ready(self, layers: Sequence[nn.Module], rows: Tensor) -> Ready | None:
        """Every convolution's (packed weights, bias); None where native kernels cannot run the layers on these rows:
        there are none, weights are not frozen, or a convolution has groups or a very large kernel."""
        if not fit(rows):
            return None
        ready: Ready = {}
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                if layer.groups > 1 or layer.weight[0, 0].numel() > TAPS:
                    return None
                packed = self._packed.setdefault(layer, Packed()).of([layer.weight], [layer.bias])
                if packed is None:
                    return None
                ready[layer] = packed
        return ready


def fused(layers: Sequence[nn.Module]) -> list[tuple[nn.Module, bool]]:
    """The layers, and whether the ReLU that followed a convolution is done with it."""
    steps: list[tuple[nn.Module, bool]] = []
    for layer in layers:
        if type(layer) is nn.ReLU and steps and isinstance(steps[-1][0], nn.Conv2d):
            steps[-1] = steps[-1][0], True
        else:
            steps.append((layer, False))
    return steps


def row_of(places: Tensor, positions: int) -> Tensor:
    """(positions,): which of the places a position is, -1 if none."""
    rows = torch.full((positions,), -1, device=places.device)
    rows[places] = torch.arange(places.shape[0], device=places.device)
    return rows
