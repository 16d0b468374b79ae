"""Conditionally parameterised convolution: every sample is convolved with its own mixture of expert kernels.

Nothing is skipped: the weights adapt. Mixing kernels first and convolving once gives the output of a mixture of
`experts` convolutions for little more than the cost of one.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynanet.core.errors import ConfigError, check_sizes


class CondConv2d(nn.Module):
    """CondConv (Yang et al. 2019, arXiv:1904.04971, sec. 3.1): y = conv(x, sum over e of r_e(x) W_e), with r = sigmoid.

    Replaces an nn.Conv2d. Overhead per sample, in MACs: in_channels x experts for the routing and experts x (number
    of weights of one kernel) for the mixing; the convolution itself costs what an nn.Conv2d costs. Parameters: experts
    times as many.

    Args:
        in_channels: of x (B, in_channels, H, W).
        out_channels: of the output.
        kernel_size: side of the square kernel.
        experts: kernels to mix. The paper mostly uses 8; 1 is a gated convolution.
        stride: of the convolution.
        padding: zeros on every side.
        dilation: between the taps of the kernel.
        groups: of the convolution.
        bias: one learned bias per expert, mixed like the kernels.

    Raises:
        ConfigError: a size below 1 (padding below 0), or channels that the groups do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        experts: int = 8,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_convolution(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        check_sizes(experts=experts)
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.weight, self.bias = kernel_bank(experts, in_channels // groups, out_channels, kernel_size, bias=bias)
        self.route = nn.Linear(in_channels, experts)

    def routing(self, x_BCHW: Tensor) -> Tensor:
        """The weight of every expert for a sample: (B, experts), each in (0, 1)."""
        return self.route(x_BCHW.mean((2, 3))).sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W'); H' and W' as nn.Conv2d has them."""
        weight, bias = mix_kernels(self.routing(x_BCHW), self.weight, self.bias)
        return conv2d_per_sample(x_BCHW, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def conv2d_per_sample(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve every sample with its own kernel, all samples at once.

    One grouped convolution with the samples as groups. A graph with a dynamic batch cannot hold that (the number of
    groups of an ONNX Conv is a constant), so an exported program unfolds the image and multiplies matrices: the same
    MACs, and kernel_size^2 times the input in memory.

    Args:
        x_BCHW: (B, C, H, W); B may be 0.
        weight: (B, O, C / groups, k, k), or (1, O, C / groups, k, k) where all samples share a kernel.
        bias: (B, O), or (1, O) where all samples share it.
        stride: of the convolution.
        padding: zeros on every side.
        dilation: between the taps.
        groups: of the convolution of a sample.

    Returns:
        (B, O, H', W').
    """
    if weight.shape[0] == 1:
        return F.conv2d(x_BCHW, weight[0], None if bias is None else bias[0], stride, padding, dilation, groups)
    if torch.compiler.is_exporting():
        y = _unfolded(x_BCHW, weight, stride, padding, dilation, groups)
    elif x_BCHW.shape[0] == 0:  # a convolution cannot have 0 groups
        y = F.conv2d(x_BCHW, weight.new_zeros(weight.shape[1:]), None, stride, padding, dilation, groups)
    else:
        batch, outs = weight.shape[:2]
        side_by_side = x_BCHW.reshape(1, batch * x_BCHW.shape[1], *x_BCHW.shape[2:])
        y = F.conv2d(side_by_side, weight.flatten(0, 1), None, stride, padding, dilation, batch * groups)
        y = y.reshape(batch, outs, *y.shape[2:])
    return y if bias is None else y + bias[:, :, None, None]


def mix_kernels(shares_BE: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Mix kernels (E, O, I, k, k) and biases (E, O) for every sample: (B, O, I, k, k) and (B, O)."""
    mixed = (shares_BE @ weight.flatten(1)).reshape(shares_BE.shape[0], *weight.shape[1:])
    return mixed, None if bias is None else shares_BE @ bias


def kernel_bank(
    kernels: int, ins: int, outs: int, size: int, *, bias: bool
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Kernels (kernels, outs, ins, size, size) and biases (kernels, outs), each initialised as in nn.Conv2d."""
    weight = nn.Parameter(torch.empty(kernels, outs, ins, size, size))
    limit = (ins * size**2) ** -0.5
    nn.init.uniform_(weight, -limit, limit)
    return weight, nn.Parameter(torch.empty(kernels, outs).uniform_(-limit, limit)) if bias else None


def check_convolution(ins: int, outs: int, kernel: int, stride: int, padding: int, dilation: int, groups: int) -> None:
    """Check the sizes of a convolution.

    Raises:
        ConfigError: a size below 1 (padding below 0), or channels that the groups do not divide.
    """
    check_sizes(in_channels=ins, out_channels=outs, kernel_size=kernel, stride=stride, dilation=dilation, groups=groups)
    check_sizes(0, padding=padding)
    if ins % groups or outs % groups:
        raise ConfigError(f"groups must divide in_channels = {ins} and out_channels = {outs}, got {groups}")


def _unfolded(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, groups: int) -> Tensor:
    batch, outs, _, kernel, _ = weight.shape
    height, width = ((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in x.shape[2:])
    taps = F.unfold(x, kernel, dilation, padding, stride)  # (B, C k k, H' W')
    taps = taps.reshape(batch, groups, taps.shape[1] // groups, height * width)
    y = torch.matmul(weight.reshape(batch, groups, outs // groups, taps.shape[2]), taps)
    return y.reshape(batch, outs, height, width)
