"""Channel skip: a chain of convolutions of which each runs some of its channel groups. First form."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import StructureError
from dynanet.core.trace import Frame


class ChannelSkip(Dynamic):
    """Gated convolutions: each computes the output groups it keeps, from the input groups kept before.

    What a convolution costs hangs on two decisions, in and out. So a unit is a block of the weight matrix, its keep is
    keep_in x keep_out, and the price is linear again; and the chain is one layer, the smallest module that sees every
    decision its price depends on. (Gating by saliency: FBS, Gao et al. 2019, arXiv:1810.05331.)

    Args:
        convs: stride-1 or strided convolutions without grouping; each is followed by a ReLU.
        gates: gate i maps conv i's input to a Decision with keep (B, groups).
        groups: channels are kept in so many groups.

    Raises:
        StructureError: not one gate per convolution, or channels that the groups do not divide.
    """

    def __init__(self, convs: Sequence[nn.Conv2d], gates: Sequence[nn.Module], groups: int):
        super().__init__()
        if len(convs) != len(gates) or not convs:
            raise StructureError(f"channel skip needs one gate per convolution; got {len(convs)} and {len(gates)}")
        if any(c.in_channels % groups or c.out_channels % groups or c.groups != 1 for c in convs):
            raise StructureError(f"the channels of every convolution must be divisible by {groups} groups")
        self.convs, self.gates, self.groups = nn.ModuleList(convs), nn.ModuleList(gates), groups

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W'); groups that were not kept are zero."""
        keep_in = x_BCHW.new_ones(x_BCHW.shape[0], self.groups)
        for i, (conv, gate) in enumerate(zip(self.convs, self.gates, strict=True)):
            first = i * self.groups**2
            keep_out, score = self.obey(gate(x_BCHW))
            self.tell(Decision((keep_in[:, :, None] * keep_out[:, None, :]).flatten(1), score), first)
            assert isinstance(conv, nn.Conv2d)
            compute = self._gathered if self.gathers else self._masked
            x_BCHW = compute(conv, x_BCHW, keep_in, keep_out, first).relu()
            keep_in = keep_out
        return x_BCHW

    def _masked(self, conv: nn.Conv2d, x: Tensor, keep_in: Tensor, keep_out: Tensor, first: int) -> Tensor:
        return conv(x) * keep_out.repeat_interleave(conv.out_channels // self.groups, 1)[..., None, None]

    def _gathered(self, conv: nn.Conv2d, x: Tensor, keep_in: Tensor, keep_out: Tensor, first: int) -> Tensor:
        """Samples that chose alike run together, through the slice of the weights they chose."""
        patterns, which = torch.cat([keep_in, keep_out], 1).unique(dim=0, return_inverse=True)
        height, width = _out_size(conv, x)
        y = x.new_zeros(x.shape[0], conv.out_channels, height, width)
        blocks = range(first, first + self.groups**2)
        for p, pattern in enumerate(patterns):
            rows = (which == p).nonzero().squeeze(1)
            ins = _channels(pattern[: self.groups], conv.in_channels)
            outs = _channels(pattern[self.groups :], conv.out_channels)
            if not len(outs):
                continue
            with self.within(Frame(self, blocks, (x.shape[0],), rows, None, True)):
                weight = conv.weight.index_select(0, outs).index_select(1, ins)
                bias = None if conv.bias is None else conv.bias[outs]
                if len(ins):
                    part = nn.functional.conv2d(
                        x.index_select(0, rows).index_select(1, ins),
                        weight,
                        bias,
                        conv.stride,
                        conv.padding,
                        conv.dilation,
                    )
                else:  # nothing came in: only the bias goes out
                    part = y.new_zeros(len(rows), len(outs), height, width)
                    part = part if bias is None else part + bias[:, None, None]
            y[rows[:, None], outs[None, :]] = part
        return y


def _channels(keep: Tensor, channels: int) -> Tensor:
    return (keep > 0).repeat_interleave(channels // keep.shape[0]).nonzero().squeeze(1)


def _out_size(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    sizes = []
    for n, k, s, p, d in zip(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True):
        sizes.append((n + 2 * int(p) - d * (k - 1) - 1) // s + 1)
    return sizes[0], sizes[1]
