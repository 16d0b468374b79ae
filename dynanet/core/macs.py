"""MACs counted at dispatch: what really ran, by the unit it ran for."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dynanet.core.errors import StructureError
from dynanet.core.trace import Trace

try:  # private names, which another version of torch may not have
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
except ImportError:
    _HIDDEN_HERE = False
else:
    _HIDDEN_HERE = True

aten = torch.ops.aten
quantized = torch.ops.quantized
_LINEARS = ("", "_relu", "_leaky_relu", "_tanh", "_dynamic", "_relu_dynamic", "_dynamic_fp16", "_relu_dynamic_fp16")
_CELLS = ("lstm", "gru", "rnn_relu", "rnn_tanh")


class CountMacs(TorchDispatchMode):
    """Counts the multiply-accumulates of convolutions, linears, matmuls and attention that torch executes.

    torch's own formulas, and those it lacks: its registry has none for scaled dot product attention on the CPU, for
    fused recurrent layers, for the fast path of nn.MultiheadAttention and nn.TransformerEncoderLayer in eval mode, for
    nn.Bilinear, for sampling between pixels, for linears and convolutions of quantized weights, for distances between
    rows, and for products with a vector, and would count them as 0.

    Attributes:
        macs: MACs by the innermost unit that was running, as (layer's name, first unit of the frame); None for what
            runs in no unit.
        uncounted: names of operators that ran and are not counted, though they may multiply: Fourier transforms,
            solvers, operators of other packages.

    Args:
        trace: of the recording that is open; without it all counts lie under None.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # By default torch hides a dispatch mode from its compiler, and imports the compiler for that, which takes a
        # second or more. The end of this file does the same without the import, where it can.
        return not _HIDDEN_HERE

    def __init__(self, trace: Trace | None = None) -> None:
        super().__init__()
        self.trace = trace
        self.macs: Counter[tuple[str, range] | None] = Counter()
        self.uncounted: set[str] = set()

    @property
    def total(self) -> int:
        """All MACs counted so far."""
        return sum(self.macs.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._inside(func)(*args, **kwargs)
        packet = func._overloadpacket
        # A fake tensor asks for its device through an operator that cannot even be looked into.
        if packet not in flop_registry and packet not in _MACS and func is not torch.ops.prim.device.default:
            # Composite operators (linear under inference mode) arrive whole: look inside.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        self._check(func)
        out = func(*args, **kwargs)
        if packet in _MACS:
            self.macs[self._unit()] += _MACS[packet](args, out)
        elif packet in flop_registry:
            self.macs[self._unit()] += flop_registry[packet](*args, **kwargs, out_val=out) // 2
        return out

    def _check(self, func: Any) -> None:
        """Refuse an operator that multiplies and has no formula; note one that may do more than is counted."""
        packet = func._overloadpacket
        if packet in flop_registry or packet in _MACS:
            return
        name = packet._qualified_op_name
        space, operator = name.split("::")
        if space in _MULTIPLYING and _PRODUCT.search(operator) and not _NO_PRODUCT.search(operator):
            raise StructureError(
                f"the operator {name} multiplies, and its MACs cannot be counted; price the model without it (before "
                f"it is quantized or compiled, say)"
            )
        if space not in _KNOWN or _MORE.search(operator):
            self.uncounted.add(name)

    def _inside(self, func: HigherOrderOperator) -> Callable:
        """An operator on functions (a condition, a loop) as the plain operators it runs, counted one by one."""
        kernel = func.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
        if func is torch.ops.higher_order.cond:  # its own kernel refuses to run under a mode
            kernel = _branch
        if kernel is None:
            raise StructureError(
                f"MACs cannot be counted inside the higher-order operator {func.name()}; count the model without it"
            )

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self:
                return kernel(*args, **kwargs)

        return counted

    def _unit(self) -> tuple[str, range] | None:
        if self.trace is None or not self.trace.frames:
            return None
        frame = self.trace.frames[-1]
        return self.trace.names[frame.layer], frame.units


def _branch(condition: Any, yes: Callable, no: Callable, operands: Any) -> Any:
    return (yes if condition else no)(*operands)


def _attention(args: Any, out: Any) -> int:
    query, key, value = args[:3]  # (..., T, D), (..., S, D), (..., S, V)
    return math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _fused_rnn(args: Any, out: Any) -> int:
    x, w_input, w_hidden = args[:3]  # (T, B, I), (G H, I), (G H, H)
    return x.shape[0] * x.shape[1] * (w_input.numel() + w_hidden.numel())


def _cudnn_rnn(args: Any, out: Any) -> int:
    x, weights = args[:2]  # (T, B, I), (B, T, I) or packed (N, I); the weights and biases of all layers and directions
    return math.prod(x.shape[:-1]) * sum(w.numel() for w in weights if w.dim() == 2)


def _sampled(args: Any, out: Any) -> int:
    return 4 * out.numel()  # each value from four neighbours


def _native_attention(args: Any, out: Any) -> int:
    """Linears on the tokens that are there; attention on their padded rectangle, as the operator computes it."""
    tokens, longest, attended = _tokens(args[0])
    embed = args[3]
    return tokens * 4 * embed * embed + attended * longest * 2 * embed


def _encoder_layer(args: Any, out: Any) -> int:
    tokens, longest, attended = _tokens(args[0])
    embed, feed_forward = args[1], args[14].numel() + args[16].numel()
    return tokens * (4 * embed * embed + feed_forward) + attended * longest * 2 * embed


def _tokens(x: Tensor) -> tuple[int, int, int]:
    """(tokens, the longest sample's, samples times that) of (B, T, D) or of a nested tensor.

    Torch's fast path makes a nested tensor where padding is masked.
    """
    if not x.is_nested:
        return x.shape[0] * x.shape[1], x.shape[1], x.shape[0] * x.shape[1]
    lengths = x._nested_tensor_size()[:, 0]
    longest = int(lengths.max())
    return int(lengths.sum()), longest, lengths.shape[0] * longest


def _vector(args: Any, out: Any) -> int:
    matrices = [a for a in args if isinstance(a, Tensor)][-2:]
    return max(a.numel() for a in matrices)


def _summed_bmm(args: Any, out: Any) -> int:
    return math.prod(args[1].shape) * args[2].shape[-1]


def _bilinear(args: Any, out: Any) -> int:
    return args[0].shape[0] * args[1].numel()  # (rows, I1), (O, I1, I2), (rows, I2)


def _grouped_mm(args: Any, out: Any) -> int:
    """Both (groups, ., .), or one of them with the groups side by side in one matrix."""
    left, right = args[:2]
    both = left.dim() == right.dim() == 3
    return math.prod(left.shape if both else left.shape[-2:]) * right.shape[-1]


def _rows_times_columns(args: Any, out: Any) -> int:
    return args[0].numel() * out.shape[-1]  # (..., inputs) to (..., outputs)


def _activated(args: Any, out: Any) -> int:
    return args[1].numel() * out.shape[-1]


def _distances(args: Any, out: Any) -> int:
    return out.numel() * args[0].shape[-1]


def _packed_conv(args: Any, out: Any) -> int:
    return out.numel() * args[1].unpack()[0][0].numel()


def _packed_cell(args: Any, out: Any) -> int:
    return args[0].shape[0] * sum(torch.ops.quantized.linear_unpack(w)[0].numel() for w in args[2:4])


_MACS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._native_multi_head_attention: _native_attention,
    aten._transformer_encoder_layer_fwd: _encoder_layer,
    aten.mkldnn_rnn_layer: _fused_rnn,
    aten._cudnn_rnn: _cudnn_rnn,
    aten.miopen_rnn: _cudnn_rnn,
    aten._grouped_mm: _grouped_mm,
    aten._trilinear: _bilinear,
    aten.addbmm: _summed_bmm,
    aten.addbmm_: _summed_bmm,
    aten.mv: _vector,
    aten.addmv: _vector,
    aten.addmv_: _vector,
    aten.dot: _vector,
    aten.vdot: _vector,
    aten.grid_sampler_2d: _sampled,
    aten._cdist_forward: _distances,
    aten._addmm_activation: _activated,
    **dict.fromkeys((aten._int_mm, aten._weight_int8pack_mm, aten._scaled_mm), _rows_times_columns),
    **{getattr(quantized, f"linear{kind}"): _rows_times_columns for kind in _LINEARS},
    **{getattr(quantized, f"conv{d}d{kind}"): _packed_conv for d in (1, 2, 3) for kind in ("", "_relu", "_dynamic")},
    **{getattr(quantized, f"quantized_{kind}_cell_dynamic"): _packed_cell for kind in _CELLS},
}

# Operators without a formula that multiply, by their names.
_MULTIPLYING = (
    "aten",
    "quantized",
    "_quantized",
    "onednn",
    "mkldnn",
    "mkl",
    "sparse",
    "mkldnn_prepacked",
    "torchvision",
)
_PRODUCT = re.compile("mm(_|$)|matmul|linear|conv|attention|rnn|lstm|gru|cell|grid_sampler_3d")
_NO_PRODUCT = re.compile("upsample|pack($|_w)|convert|reorder|flatten|_thnn_fused|combination|weight$|make_|quantize_")
_MORE = re.compile("fft_|solve|linalg_(?!vector_norm|cross|check)")
_KNOWN = ("aten", "prim", "prims", "dynanet", "quantized", "_quantized", "higher_order", "profiler")

# `torch.cond` compiles even in eager mode, and would compile the counting too: that frame and all below it run as is.
if _HIDDEN_HERE:
    _SKIP = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(CountMacs.__torch_dispatch__.__code__, _SKIP)
