"""Chains of convolutions as the native kernels take them: packed weights, fused ReLUs."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from dynanet.core.plain import hooked
from dynanet.ops.native.library import fit
from dynanet.ops.native.pixels import Convolution
from dynanet.ops.native.products import TAPS, PackedWeights

Ready = dict[nn.Module, tuple[Tensor, Tensor | None]]


class Chain:
    """The packed weights of a chain's convolutions."""

    def __init__(self) -> None:
        self._packed: dict[nn.Module, PackedWeights] = {}

    def ready(self, layers: Sequence[nn.Module], rows: Tensor | None = None) -> Ready | None:
        """Every convolution's packed weights and bias; None where native kernels cannot run the layers on these rows.

        They cannot without kernels or without a convolution, if a weight has a gradient, or if a convolution has hooks,
        groups or a very large kernel.
        """
        if not fit(rows):
            return None
        ready: Ready = {}
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                if hooked(layer) or layer.groups > 1 or layer.weight[0, 0].numel() > TAPS:
                    return None
                packed = self._packed.setdefault(layer, PackedWeights()).of([layer.weight], [layer.bias])
                if packed is None:
                    return None
                ready[layer] = packed
        return ready or None


def fused(layers: Sequence[nn.Module]) -> list[tuple[nn.Module, bool]]:
    """Pair every layer with whether the ReLU after it, dropped here, is applied with it."""
    steps: list[tuple[nn.Module, bool]] = []
    for layer in layers:
        if type(layer) is nn.ReLU and not hooked(layer) and steps and isinstance(steps[-1][0], nn.Conv2d):
            steps[-1] = steps[-1][0], True
        else:
            steps.append((layer, False))
    return steps


class LayerRun(NamedTuple):
    """Layers of a chain of parts that run together: convolutions in one call, or one other layer.

    Attributes:
        part: of the first layer.
        reach: of the last layer; see `pixels.Convolution`.
        convolutions: in order; none for another layer.
        other: that layer; None for convolutions.
    """

    part: int
    reach: int
    convolutions: list[Convolution]
    other: nn.Module | None


def runs(parts: Sequence[Sequence[nn.Module]], reach: Sequence[int], *, apart: bool) -> list[LayerRun]:
    """Group the layers of a chain in as few runs as possible; with `apart`, no run spans two parts."""
    found: list[LayerRun] = []
    for j, part in enumerate(parts):
        for layer, relu in fused(part):
            if not isinstance(layer, nn.Conv2d):
                found.append(LayerRun(j, reach[j], [], layer))
                continue
            step = Convolution(layer, relu, reach[j])
            if found and found[-1].convolutions and not (apart and found[-1].part != j):
                before = found.pop()
                found.append(LayerRun(before.part, reach[j], [*before.convolutions, step], None))
            else:
                found.append(LayerRun(j, reach[j], [step], None))
    return found
