"""Experts of two linear layers as two products: rows are read where they lie, and answers weighted and added up."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dynanet.core.plain import hooked, is_sequential
from dynanet.ops.native.library import chosen, fit, states
from dynanet.ops.native.products import PackedWeights, product, product_add_


class PackedExperts:
    """The packed weights of experts that are all a Sequential of Linear, activation, Linear; see `PackedWeights`.

    They are packed again when a weight was changed or a layer exchanged. Where an expert or a layer has hooks, nothing
    runs natively.
    """

    def __init__(self) -> None:
        self._up = PackedWeights()
        self._down = PackedWeights()
        self._wide = 0
        self._held: list[tuple[dict[str, Any], list[object]]] = []
        self._weights: list[Tensor] = []
        self._called: list[nn.Module] = []
        self._hooks: list[dict[int, Any]] = []
        self._state: list[tuple[int, int, bool] | None] = []
        self._ready: _Ready | None = None

    def add_(self, answer: Tensor, x: Tensor, experts: nn.ModuleList, keep: Tensor, weight: Tensor) -> bool:
        """Add the sum of weight * expert(row) over the experts that a row keeps.

        Args:
            answer: (R, outputs), contiguous; changed.
            x: rows, (R, inputs).
            experts: E modules.
            keep: (R, E), above 0 where a row goes to an expert.
            weight: (R, E).

        Returns:
            False if native kernels cannot compute it; then nothing was added.
        """
        if x.dim() != 2 or answer.dim() != 2 or not fit(x, weight):
            return False
        ready = self._packed(experts)
        if ready is None or ready.inputs != x.shape[1] or ready.outputs != answer.shape[1]:
            return False
        # NumPy, because one of torch's operators takes as long as all of these where rows are few.
        kept = (keep > 0).numpy().T
        expert, row = kept.nonzero()  # sorted by expert, then by row
        counts = np.bincount(expert, minlength=len(kept)).tolist()
        order = torch.from_numpy(np.ascontiguousarray(row))
        scale = torch.from_numpy(weight.to(x.dtype).detach().numpy()[row, expert])
        rectifies = type(ready.activation) is nn.ReLU
        hidden = product(x, *ready.up, ready.hidden, counts=counts, around=order[:, None], relu=rectifies)
        hidden = hidden if rectifies else ready.activation(hidden)
        product_add_(answer, hidden, *ready.down, counts=counts, to=order, scale=scale)
        return True

    def _packed(self, experts: nn.ModuleList) -> "_Ready | None":
        kernels = chosen()
        assert kernels is not None
        if self._wide != kernels.wide or not self._unchanged(experts):
            self._wide, self._ready = kernels.wide, self._made(list(experts))
            parts = [part for expert in experts for part in expert.children()]
            dicts: list[dict[str, Any]] = [experts._modules]
            dicts += [e._modules for e in experts] + [part._parameters for part in parts]
            self._held = [(held, list(held.values())) for held in dicts]
            self._called = [*experts, *parts]
            self._hooks = [hooks for m in self._called for hooks in (m._forward_hooks, m._forward_pre_hooks)]
            self._weights = [p for _, values in self._held for p in values if isinstance(p, Tensor)]
            self._state = self._states()
        if any(self._hooks) and any(map(hooked, self._called)):  # hooks need the layers to be called
            return None
        return self._ready

    def _unchanged(self, experts: nn.ModuleList) -> bool:
        """Whether layers and weights are those that were packed. Looks past module attributes, which are slow."""
        if not self._held or self._held[0][0] is not experts._modules:
            return False
        for held, values in self._held:
            if len(held) != len(values) or not all(map(operator.is_, held.values(), values)):
                return False
        return self._state == self._states()

    def _states(self) -> list[tuple[int, int, bool] | None]:
        return states(None if p.is_inference() else p for p in self._weights)

    def _made(self, experts: Sequence[nn.Module]) -> "_Ready | None":
        if not all(map(is_sequential, experts)):
            return None
        stacks = [list(expert.children()) for expert in experts]
        for stack in stacks:
            if len(stack) != 3 or type(stack[1]) not in _ELEMENTWISE or {type(stack[0]), type(stack[2])} != {nn.Linear}:
                return None
            if any(map(hooked, stack)):
                return None
        ups, activations, downs = (list(column) for column in zip(*stacks, strict=True))
        sizes = {(up.in_features, up.out_features, down.in_features, down.out_features) for up, _, down in stacks}
        biases = {(up.bias is None, down.bias is None) for up, _, down in stacks}
        if len(sizes) > 1 or len(biases) > 1 or len({repr(activation) for activation in activations}) > 1:
            return None
        up = self._up.of([layer.weight for layer in ups], [layer.bias for layer in ups])
        down = self._down.of([layer.weight for layer in downs], [layer.bias for layer in downs])
        if up is None or down is None:
            return None
        return _Ready(up, activations[0], down, ups[0].in_features, ups[0].out_features, downs[0].out_features)

    def __reduce__(self) -> tuple[type["PackedExperts"], tuple[()]]:
        return PackedExperts, ()


class _Ready(NamedTuple):
    up: tuple[Tensor, Tensor | None]
    activation: nn.Module
    down: tuple[Tensor, Tensor | None]
    inputs: int
    hidden: int
    outputs: int


# Without parameters, number by number.
_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.ReLU6, nn.Hardswish, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.Mish)
