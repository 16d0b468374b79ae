"""MACs counted at dispatch: what really ran, by the unit it ran for."""

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dynanet.core.trace import Trace

aten = torch.ops.aten


class CountMacs(TorchDispatchMode):
    """Counts the multiply-accumulates of convolutions, linears, matmuls and attention that torch executes.

    torch's own formulas, and those it lacks: on the CPU its registry has none for scaled dot product attention, for
    the fused LSTM, and for products with a vector, and would count them as 0.

    Attributes:
        macs: MACs by the innermost unit that was running, as (layer's name, first unit of the frame); None for what
            runs in no unit.

    Args:
        trace: of the recording that is open; without it all counts lie under None.
    """

    def __init__(self, trace: Trace | None = None):
        super().__init__()
        self.trace = trace
        self.macs: Counter[tuple[str, range] | None] = Counter()

    @property
    def total(self) -> int:
        """All MACs counted so far."""
        return sum(self.macs.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry and packet not in _MACS:
            # Composite operators (linear under inference mode) arrive whole: look inside.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if packet in _MACS:
            self.macs[self._unit()] += _MACS[packet](args, out)
        elif packet in flop_registry:
            self.macs[self._unit()] += flop_registry[packet](*args, **kwargs, out_val=out) // 2
        return out

    def _unit(self) -> tuple[str, range] | None:
        if self.trace is None or not self.trace.frames:
            return None
        frame = self.trace.frames[-1]
        return self.trace.names[frame.layer], frame.units


def _attention(args: Any, out: Any) -> int:
    query, key, value = args[:3]  # (..., T, D), (..., S, D), (..., S, V)
    return math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _fused_rnn(args: Any, out: Any) -> int:
    x, w_input, w_hidden = args[:3]  # (T, B, I), (G H, I), (G H, H)
    return x.shape[0] * x.shape[1] * (w_input.numel() + w_hidden.numel())


def _vector(args: Any, out: Any) -> int:
    matrices = [a for a in args if isinstance(a, Tensor)][-2:]
    return max(a.numel() for a in matrices)


_MACS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten.mkldnn_rnn_layer: _fused_rnn,
    aten.mv: _vector,
    aten.addmv: _vector,
    aten.dot: _vector,
    aten.vdot: _vector,
}
