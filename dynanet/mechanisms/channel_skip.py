"""Channel skip: a chain of convolutions, each of which computes some of its channel groups from those kept before."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import StructureError, check_shares
from dynanet.core.gate import Gate, check_units
from dynanet.core.objective import Objective
from dynanet.core.plain import check_plain
from dynanet.core.trace import Frame, Trace
from dynanet.gates.rules import TopK


class ChannelSkip(Dynamic):
    """Gated convolutions: each computes the output groups it keeps, from the input groups kept before.

    The cost of a convolution depends on two decisions, in and out. So a unit is a block of the weight matrix, and its
    keep is keep_in x keep_out, which makes the price linear. The chain is one layer, because that is the smallest
    module that sees every decision its price depends on. All of the chain's input channels are kept.

    With `boost` this is feature boosting and suppression (FBS: Gao et al. 2019, arXiv:1810.05331, section 3): the kept
    groups are multiplied with their scores, which `fbs_gate` makes saliencies. These replace the batch norms' scales,
    which are frozen: otherwise they could grow while the L1 term shrinks the saliencies.

    Args:
        convs: stride-1 or strided convolutions without grouping, with zero padding in numbers.
        gates: gate i maps conv i's input (B, C, H, W) to a Decision with keep (B, groups).
        groups: number of groups of output channels; one number, or one per convolution. As many as there are channels
            makes every channel a group.
        norms: the batch norm after each convolution, or None where there is none.
        afters: what follows each convolution and its norm, channel by channel, and maps 0 to 0: ReLU (the default),
            pooling, nn.Identity, or an nn.Sequential of these.
        boost: multiply what is kept with its score.

    Raises:
        StructureError: not one of each per convolution, convolutions that do not fit together, groups that do not
            divide, a convolution that cannot be cut into blocks, a norm of other channels, a layer after it that does
            not map 0 to 0, or a gate with another number of units.
    """

    def __init__(
        self,
        convs: Sequence[nn.Conv2d],
        gates: Sequence[nn.Module],
        groups: int | Sequence[int],
        *,
        norms: Sequence[nn.BatchNorm2d | None] | None = None,
        afters: Sequence[nn.Module] | None = None,
        boost: bool = False,
    ) -> None:
        super().__init__()
        counts = [groups] * len(convs) if isinstance(groups, int) else list(groups)
        following = [nn.ReLU() for _ in convs] if afters is None else list(afters)
        normed = [None] * len(convs) if norms is None else list(norms)
        if not convs or {len(convs)} != {len(gates), len(counts), len(following), len(normed)}:
            raise StructureError(
                f"channel skip needs one gate, norm and layer after it per convolution; got {len(convs)} convolutions, "
                f"{len(gates)} gates, {len(counts)} groups, {len(normed)} norms and {len(following)} layers after"
            )
        for i, (conv, gate, norm, after) in enumerate(zip(convs, gates, normed, following, strict=True)):
            _check(conv, counts[i], counts[i - 1] if i else 1, gate, norm, after)
            if i and conv.in_channels != convs[i - 1].out_channels:
                raise StructureError(
                    f"convolution {i} takes {conv.in_channels} channels and the one before returns "
                    f"{convs[i - 1].out_channels}; make them equal"
                )
        self.convs = nn.ModuleList(convs)
        self.gates = nn.ModuleList(gates)
        self.afters = nn.ModuleList(following)
        self.norms = nn.ModuleList(nn.Identity() if norm is None else norm for norm in normed)
        self.groups = tuple(counts)
        self.boost = boost
        if boost:
            for norm in normed:
                if norm is not None and norm.weight is not None:
                    norm.weight.requires_grad_(False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W'); groups that were not kept are zero."""
        keep_in = x_BCHW.new_ones(x_BCHW.shape[0], 1)
        first = 0
        for i, gate in enumerate(self.gates):
            keep_out, score = self.apply_override(gate(x_BCHW))
            keep = (keep_in[:, :, None] * keep_out[:, None, :]).flatten(1)
            self.log(Decision(keep, score), first)
            factor = score if self.boost else None
            if self.gathers:
                x_BCHW = self._gathered(i, x_BCHW, keep_in, keep_out, factor, first)
            else:
                x_BCHW = self._masked(i, x_BCHW, keep_out if factor is None else keep_out * factor)
            keep_in = keep_out
            first += keep.shape[1]
        return x_BCHW

    def _masked(self, i: int, x: Tensor, factor: Tensor) -> Tensor:
        y = self.norms[i](self.convs[i](x))
        return self.afters[i](y * _spread(factor, y.shape[1]))

    def _gathered(
        self, i: int, x: Tensor, keep_in: Tensor, keep_out: Tensor, factor: Tensor | None, first: int
    ) -> Tensor:
        """Rows that keep the same groups run together, through the blocks of the weights that they keep."""
        conv = self.convs[i]
        assert isinstance(conv, nn.Conv2d)
        norm = self.norms[i]
        after = self.afters[i]
        batch = x.shape[0]
        groups_in = keep_in.shape[1]
        groups_out = keep_out.shape[1]
        blocks = range(first, first + groups_in * groups_out)
        y = None
        for pattern, rows in _patterns(torch.cat([keep_in, keep_out], 1)):
            ins = pattern[:groups_in].nonzero().squeeze(1)
            outs = pattern[groups_in:].nonzero().squeeze(1)
            if not len(outs):
                continue
            with self.within(Frame(self, blocks, (batch,), rows, None, True)):
                part = _block_conv(conv, _taken(_rows(x, rows), groups_in, ins, 1), ins, outs, groups_in, groups_out)
            if isinstance(norm, nn.BatchNorm2d):
                part = _normed(norm, part, outs, groups_out)
            if factor is not None:
                part = part * _spread(_rows(factor, rows).index_select(1, outs), part.shape[1])
            part = after(part)
            if len(rows) == batch and len(outs) == groups_out:
                return part
            if y is None:
                y = part.new_zeros(batch, conv.out_channels, *part.shape[2:])
            by_group = y.view(batch, groups_out, -1)
            # Under autocast a part without inputs, only a bias, has another dtype than a convolution's.
            by_group[rows[:, None], outs] = part.reshape(len(rows), len(outs), -1).to(y.dtype)
        if y is not None:
            return y
        return after(x.new_zeros(batch, conv.out_channels, *_out_size(conv, x)))


class SaliencyScorer(nn.Module):
    """Predicts how much each group of outputs matters: a linear map of the channels' mean magnitudes, and a ReLU.

    FBS (arXiv:1810.05331, section 3.3): weights are drawn as by He and biases are 1, so that a trained network is
    changed at first only by the groups that are dropped.

    Args:
        channels: of the convolution's input (B, C, H, W).
        groups: of its output.
        relative: divide magnitudes by their mean over the channels. In a residual network inputs are sums that grow
            from block to block; saliencies that grow with them would multiply, and training from random weights would
            diverge in its first steps. Not in the paper, which starts from trained weights.
    """

    def __init__(self, channels: int, groups: int, *, relative: bool = False) -> None:
        super().__init__()
        self.map = nn.Linear(channels, groups)
        self.relative = relative
        nn.init.kaiming_normal_(self.map.weight)
        nn.init.ones_(self.map.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Saliencies (B, groups), 0 or above."""
        size = x_BCHW.abs().mean((2, 3))
        if self.relative:
            size = size / size.mean(1, keepdim=True).clamp(min=1e-6)
        return self.map(size).relu()


def fbs_gate(channels: int, groups: int, density: float, *, relative: bool = False) -> Gate:
    """A gate by saliencies: every row keeps the ceil(density * groups) groups with the highest.

    Args:
        channels: of the convolution's input.
        groups: of its output.
        density: the share of groups that is kept, d in the paper.
        relative: as in `SaliencyScorer`; for residual networks.

    Raises:
        ConfigError: a density outside (0, 1].
    """
    check_shares(positive=True, density=density)
    return Gate(SaliencyScorer(channels, groups, relative=relative), TopK(ceil(density * groups - 1e-9)), units=groups)


@dataclass(frozen=True)
class SaliencyL1(Objective):
    """The sum of all saliencies of a boosted network, averaged over the batch (FBS, arXiv:1810.05331).

    The paper weights it with 1e-8.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """A scalar.

        Raises:
            StructureError: no boosted layer decided.
        """
        found = trace.all(ChannelSkip)
        calls = [call for call in trace.decisions(ChannelSkip) if found[call.name].boost]
        if not calls:
            raise StructureError(f"expected a ChannelSkip with boost; none of {sorted(found)} has it")
        return torch.stack([call.decision.score.abs().sum(1).mean() for call in calls]).sum()


# Layers that map 0 to 0 and read each channel alone, so that skipped channels stay 0.
_ZERO_STAYS_ZERO = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh, nn.Dropout,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip


def _check(
    conv: nn.Conv2d, groups_out: int, groups_in: int, gate: nn.Module, norm: nn.BatchNorm2d | None, after: nn.Module
) -> None:
    if groups_out < 1 or conv.in_channels % groups_in or conv.out_channels % groups_out:
        raise StructureError(
            f"{conv.in_channels} channels in and {conv.out_channels} out cannot be cut into {groups_in} and "
            f"{groups_out} groups; the groups of a convolution must divide its outputs, and the inputs of the next"
        )
    check_plain(conv, nn.Conv2d)
    if norm is not None:
        check_plain(norm, nn.BatchNorm2d)
    if conv.groups != 1 or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise StructureError(f"channel skip needs convolutions without grouping, padded with zeros; got {conv}")
    if norm is not None and (norm.num_features != conv.out_channels or not norm.track_running_stats):
        raise StructureError(
            f"a norm after {conv.out_channels} channels must have as many and keep statistics; got {norm}"
        )
    check_units(gate, groups_out, "groups of outputs")
    for layer in after if isinstance(after, nn.Sequential) else (after,):
        if not isinstance(layer, _ZERO_STAYS_ZERO):
            raise StructureError(
                f"{type(layer).__name__} cannot follow a gated convolution: skipped channels are 0 and must stay 0; "
                f"use ReLU, pooling or nn.Identity"
            )


def _patterns(keep: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The distinct rows of keep (B, n), each with the positions of the rows that equal it."""
    kept = keep > 0
    if keep.shape[0] < 2:
        return [(kept[0], torch.arange(1, device=keep.device))] if keep.shape[0] else []
    if keep.shape[1] <= 62:  # rows that fit into an int64 sort faster as numbers
        code = (kept.long() << torch.arange(keep.shape[1], device=keep.device)).sum(1)
        _, which, counts = code.unique(return_inverse=True, return_counts=True)
    else:
        _, which, counts = kept.unique(dim=0, return_inverse=True, return_counts=True)
    return [(kept[rows[0]], rows) for rows in which.argsort(stable=True).split(counts.tolist())]


def _block_conv(conv: nn.Conv2d, x: Tensor, ins: Tensor, outs: Tensor, groups_in: int, groups_out: int) -> Tensor:
    """The convolution from the groups `ins` to the groups `outs`; from none, only its bias."""
    bias = None if conv.bias is None else _taken(conv.bias, groups_out, outs, 0)
    if not len(ins):
        part = x.new_zeros(x.shape[0], len(outs) * (conv.out_channels // groups_out), *_out_size(conv, x))
        return part if bias is None else part + bias[:, None, None]
    weight = _taken(_taken(conv.weight, groups_out, outs, 0), groups_in, ins, 1)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)


def _normed(norm: nn.BatchNorm2d, x: Tensor, outs: Tensor, groups: int) -> Tensor:
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = (None if t is None else _taken(t, groups, outs, 0) for t in statistics)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)


def _rows(t: Tensor, rows: Tensor) -> Tensor:
    return t if len(rows) == t.shape[0] else t.index_select(0, rows)


def _taken(t: Tensor, groups: int, chosen: Tensor, axis: int) -> Tensor:
    """The chosen groups of an axis, whole groups at a time; t itself where all are chosen."""
    if len(chosen) == groups:
        return t
    return t.unflatten(axis, (groups, -1)).index_select(axis, chosen).flatten(axis, axis + 1)


def _spread(per_group: Tensor, channels: int) -> Tensor:
    """(B, groups) to (B, channels, 1, 1)."""
    return per_group.repeat_interleave(channels // per_group.shape[1], 1)[..., None, None]


def _out_size(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    assert not isinstance(conv.padding, str)  # refused at construction
    height, width = (
        (x.shape[2 + i] + 2 * conv.padding[i] - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1
        for i in range(2)
    )
    return height, width
