"""Neuron skip: a gate decides for each row which blocks of an FFN's hidden neurons run."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, InputError, StructureError, check_sizes
from dynanet.core.gate import Gate, check_units
from dynanet.core.plain import check_plain
from dynanet.core.trace import Frame
from dynanet.gates.rules import TopK
from dynanet.nets.moefication import balanced_clusters, fit_router
from dynanet.ops.native.library import fit
from dynanet.ops.native.neurons import neurons_down, neurons_up

# Measured on one thread (512 to 2,048 features, a tenth to half of the blocks kept). From this number of rows on that
# keep the same blocks, products with slices of the weights are faster than the native kernel.
_MANY = 64
# Without the kernel, row by row is faster up to this number of rows that differ,
_FEW_ROWS = 4
# and, for any number of rows, from this number of tokens on that share a row's blocks.
_MANY_OTHERS = 8


class NeuronSkip(Dynamic):
    """Linear, activation, Linear, where each row runs only the blocks of hidden neurons that its gate keeps.

    A unit is a block of neurons: its rows of the first weight matrix and its columns of the second. A neuron that does
    not run contributes 0. Trained with a gate: conditional computation (Bengio et al. 2015, arXiv:1511.06297) and Deja
    Vu (Liu et al. 2023, arXiv:2310.17157). Made from a trained ReLU network: `moefy`.

    The leading axes of keep are the rows, and axes of x after them share the decision. With x (B, T, D), a keep (B,
    blocks) is one decision per sample for all its tokens (by far the fastest, because weights are read once), a keep
    (B, T, blocks) one per token.

    Args:
        up: D -> hidden.
        down: hidden -> out. Weights are copied; these are stored as (hidden, out), so that a block is contiguous.
        gate: maps x to a Decision with keep (rows..., hidden / block).
        activation: elementwise; ReLU if None.
        block: neurons per unit.

    Raises:
        StructureError: layers that do not fit together, a block that does not divide the hidden neurons, or a gate for
            another number of units.
    """

    def __init__(
        self, up: nn.Linear, down: nn.Linear, gate: nn.Module, *, activation: nn.Module | None = None, block: int = 16
    ) -> None:
        super().__init__()
        self.block = block
        self.blocks = _block_count(up, down, block)
        check_units(gate, self.blocks, "blocks of neurons")
        # Parameters, not layers: a session replaces static layers by engines, and these are used in slices.
        self.up = _copied(up.weight)
        self.down = _copied(down.weight.t())
        self.up_bias = None if up.bias is None else _copied(up.bias)
        self.bias = None if down.bias is None else _copied(down.bias)
        self.gate = gate
        self.activation = activation if activation is not None else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(rows..., others..., D) to (rows..., others..., out).

        Raises:
            StructureError: a gate whose rows are not leading axes of x.
        """
        keep = self.tap(self.gate(x)).keep
        lead = tuple(keep.shape[:-1])
        if x.shape[: len(lead)] != keep.shape[:-1]:
            raise StructureError(f"the gate decided for rows {lead}; expected leading axes of x, {tuple(x.shape)}")
        if not self.gathers:
            hidden = self.activation(functional.linear(x, self.up, self.up_bias))
            mask = keep.to(x.dtype).reshape(*lead, *[1] * (x.dim() - 1 - len(lead)), self.blocks, 1)
            answer = (hidden.unflatten(-1, (self.blocks, self.block)) * mask).flatten(-2) @ self.down
            return answer if self.bias is None else answer + self.bias
        rows, others = math.prod(lead), math.prod(x.shape[len(lead) : -1])
        # One frame for all: a (row, block) costs the same wherever it runs, and nothing is decided inside.
        with self.within(Frame(self, range(self.blocks), lead, None, None, True)):
            answer = self._gathered(x.reshape(rows, others, x.shape[-1]), keep.reshape(rows, self.blocks))
        return answer.reshape(*x.shape[:-1], self.down.shape[1])

    def _gathered(self, x_RTD: Tensor, keep: Tensor) -> Tensor:
        rows, others, _ = x_RTD.shape
        if rows == 0 or others == 0:
            return x_RTD.new_zeros(rows, others, self.down.shape[1])
        native = fit(x_RTD, self.up, self.up_bias, self.down, self.bias)
        if native and rows * others < _MANY:
            return self._native(x_RTD, keep)
        kept = keep > 0
        if rows == 1 or bool((kept == kept[:1]).all()):
            return self._slices(x_RTD.flatten(0, 1), kept[0])
        if native and others < _MANY:
            return self._native(x_RTD, keep)
        if rows <= _FEW_ROWS or others >= _MANY_OTHERS:
            return torch.stack([self._slices(x, k) for x, k in zip(x_RTD, kept, strict=True)])
        return self._by_block(x_RTD, kept)

    def _native(self, x_RTD: Tensor, keep: Tensor) -> Tensor:
        """Rows that keep different blocks in one kernel, which reads every weight that one of them keeps once."""
        rows, others, _ = x_RTD.shape
        keep = keep.to(x_RTD.dtype)
        if others > 1:
            keep = keep.repeat_interleave(others, 0)
        rectifies = type(self.activation) is nn.ReLU
        hidden = neurons_up(x_RTD.flatten(0, 1), self.up, self.up_bias, keep, relu=rectifies)
        if not rectifies:
            hidden = self.activation(hidden)
        return neurons_down(hidden, self.down, self.bias, keep).unflatten(0, (rows, others))

    def _slices(self, x_TD: Tensor, kept: Tensor) -> Tensor:
        """Rows that keep the same blocks. Neighbouring blocks are one slice of the weights, without a copy.

        Gathering would move every weight three times, and reading weights is nearly all that few rows cost.
        """
        # Where runs of kept blocks begin and end. Splitting at these bounds gives skipped and kept slices in turn.
        bounds = (functional.pad(kept, (1, 1)).diff().nonzero()[:, 0] * self.block).tolist()
        bias = x_TD.new_zeros(self.down.shape[1]) if self.bias is None else self.bias
        answer = bias.expand(x_TD.shape[0], -1)
        if not bounds:
            return answer
        runs = [b - a for a, b in zip([0, *bounds], [*bounds, self.up.shape[0]], strict=True)]
        up = self.up.split(runs)[1::2]
        down = self.down.split(runs)[1::2]
        sizes = runs[1::2]
        if x_TD.shape[0] == 1:  # a product with a vector is faster than one with a matrix of one row
            hidden = torch.cat([torch.mv(w, x_TD[0]) for w in up])[None]
        else:
            hidden = torch.cat([torch.mm(x_TD, w.t()) for w in up], 1)
        if self.up_bias is not None:
            hidden = hidden + self.up_bias.reshape(self.blocks, self.block)[kept].flatten()
        answer = answer.clone(memory_format=torch.contiguous_format)
        for h, w in zip(self.activation(hidden).split(sizes, 1), down, strict=True):
            # `out` instead of addmm_, whose MACs are not counted.
            answer = torch.addmm(answer, h, w, out=None if torch.is_grad_enabled() else answer)
        return answer

    def _by_block(self, x_RTD: Tensor, kept: Tensor) -> Tensor:
        """Rows that keep different blocks: every block runs once, for the rows that keep it."""
        rows, others, width = x_RTD.shape
        answer = x_RTD.new_zeros(rows, others, self.down.shape[1])
        if self.bias is not None:
            answer = answer + self.bias
        counts = kept.sum(0).tolist()
        index = kept.t().nonzero()[:, 1].split(counts)  # of every block, the rows that keep it
        up = self.up.split(self.block)
        down = self.down.split(self.block)
        biases = [None] * self.blocks if self.up_bias is None else self.up_bias.split(self.block)
        for r, w_up, b, w_down in zip(index, up, biases, down, strict=True):
            if r.shape[0]:
                x = x_RTD.index_select(0, r).reshape(r.shape[0] * others, width)
                y = self.activation(functional.linear(x, w_up, b)) @ w_down
                answer = answer.index_add_(0, r, y.reshape(r.shape[0], others, y.shape[1]))
        return answer


class LowRankScorer(nn.Module):
    """Two linear maps through a narrow layer, by which Deja Vu predicts active neurons (arXiv:2310.17157).

    It takes rank * (inputs + units) MACs per row, an FFN 2 * inputs * hidden.

    Args:
        inputs: features D.
        units: scores per row.
        rank: width of the narrow layer.
        bias: initial bias of the last layer. Positive: everything is kept at first.

    Raises:
        ConfigError: a rank below 1.
    """

    def __init__(self, inputs: int, units: int, rank: int = 16, bias: float = 1.0) -> None:
        super().__init__()
        check_sizes(rank=rank)
        self.inner = nn.Linear(inputs, rank, bias=False)
        self.outer = nn.Linear(rank, units)
        nn.init.constant_(self.outer.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to scores (..., units)."""
        return self.outer(self.inner(x))


def moefy(
    up: nn.Linear, down: nn.Linear, inputs_ND: Tensor, *, keep: int, block: int = 16, rank: int = 32, seed: int = 0
) -> NeuronSkip:
    """Turn a trained Linear, ReLU, Linear into blocks of neurons with a router.

    MoEfication (Zhang et al. 2022, arXiv:2110.01786). Neurons with similar weights form a block (balanced k-means), and
    a router learns from `inputs_ND` which blocks are active. The FFN's weights are only reordered: with everything kept
    its answer is the same. Needs a ReLU: skipping relies on neurons that are 0.

    Args:
        up: D -> hidden, trained.
        down: hidden -> out, trained.
        inputs_ND: inputs of the FFN, (N, D): a few thousand rows of training data, not of test data.
        keep: number of blocks that a row keeps, the best by the router.
        block: neurons per block; 32 in the paper.
        rank: of the router, a `LowRankScorer`.
        seed: of clustering and fitting.

    Raises:
        StructureError: layers that do not fit together, a block that does not divide the hidden neurons.
        InputError: inputs that are not (N, D).
        ConfigError: more blocks to keep than there are, or no inputs.
    """
    blocks = _block_count(up, down, block)
    if inputs_ND.dim() != 2 or inputs_ND.shape[1] != up.in_features:
        raise InputError(f"moefy got inputs of shape {tuple(inputs_ND.shape)}; expected (rows, {up.in_features})")
    if not 1 <= keep <= blocks:
        raise ConfigError(f"keep must be from 1 to {blocks}, the number of blocks; got keep = {keep}")
    order = balanced_clusters(up.weight.detach(), block, seed=seed)
    # Copies: the trained network is not changed.
    ordered_up = copy.deepcopy(up)
    ordered_down = copy.deepcopy(down)
    with torch.no_grad():
        ordered_up.weight.copy_(up.weight[order])
        ordered_down.weight.copy_(down.weight[:, order])
        if up.bias is not None:
            ordered_up.bias.copy_(up.bias[order])
        active = ordered_up(inputs_ND).relu().unflatten(-1, (blocks, block)).sum(-1)
    scorer = LowRankScorer(up.in_features, blocks, rank, bias=0.0).to(up.weight)
    fit_router(scorer, inputs_ND, active, seed=seed)
    return NeuronSkip(ordered_up, ordered_down, Gate(scorer, TopK(keep), units=blocks), block=block)


def _block_count(up: nn.Linear, down: nn.Linear, block: int) -> int:
    check_plain(up, nn.Linear)
    check_plain(down, nn.Linear)
    hidden = up.out_features
    if down.in_features != hidden:
        raise StructureError(f"the first layer returns {hidden} neurons, the second takes {down.in_features}")
    if block < 1 or hidden % block:
        raise StructureError(f"{hidden} hidden neurons cannot be cut into blocks of {block}; give a divisor")
    return hidden // block


def _copied(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
