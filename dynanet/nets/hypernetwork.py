"""Hypernetworks: a small network generates the kernels of other layers, per layer or per sample."""

import torch
from torch import Tensor, nn

from dynanet.core.errors import check_sizes
from dynanet.nets.condconv import check_convolution, conv2d_per_sample


class KernelWriter(nn.Module):
    """Generates the kernel of a convolution from a code, by two linear maps (Ha et al. 2016, arXiv:1609.09106, eq. 2).

    The first makes one vector per input channel; the second, the same for all input channels, turns each into that
    channel's slice of the kernel. Layers of the same sizes may share a writer; then their only parameters are the
    codes.

    MACs per kernel written: in_channels x hidden x (code + out_channels x kernel_size^2).

    Args:
        code: length of a code.
        in_channels: of the kernel.
        out_channels: of the kernel.
        kernel_size: side of the square kernel.
        hidden: length of the vector in between; that of the code if None, as in the paper.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(
        self, code: int, in_channels: int, out_channels: int, kernel_size: int, *, hidden: int | None = None
    ) -> None:
        super().__init__()
        hidden = code if hidden is None else hidden
        check_convolution(in_channels, out_channels, kernel_size, 1, 0, 1, 1)
        check_sizes(code=code, hidden=hidden)
        self.sizes = (in_channels, out_channels, kernel_size)
        self.spread = nn.Linear(code, in_channels * hidden)
        self.write = nn.Linear(hidden, out_channels * kernel_size**2)
        # With codes of variance 1, kernels start with variance 2 / fan-in, as He initialisation has it.
        nn.init.normal_(self.spread.weight, std=code**-0.5)
        nn.init.normal_(self.write.weight, std=(2 / (hidden * in_channels * kernel_size**2)) ** 0.5)
        nn.init.zeros_(self.spread.bias)
        nn.init.zeros_(self.write.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (B, code) to kernels (B, out_channels, in_channels, k, k)."""
        ins, outs, size = self.sizes
        slices = self.write(self.spread(codes).reshape(codes.shape[0], ins, self.write.in_features))
        return slices.reshape(codes.shape[0], ins, outs, size, size).transpose(1, 2)


class LayerCode(nn.Module):
    """A learned code of the layer, the same for every sample: the static hypernetwork of arXiv:1609.09106.

    Args:
        code: its length.
    """

    def __init__(self, code: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(1, code))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The code (1, code), independent of x."""
        return self.values


class SampleCode(nn.Module):
    """A code of the sample: global average pool, then a linear map, normalised to variance 1 by a layer norm.

    Args:
        channels: of x (B, channels, H, W).
        code: its length, 2 or more.
    """

    def __init__(self, channels: int, code: int) -> None:
        super().__init__()
        check_sizes(channels=channels)
        check_sizes(2, code=code)
        self.map = nn.Sequential(nn.Linear(channels, code), nn.LayerNorm(code))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, channels, H, W) to codes (B, code)."""
        return self.map(x_BCHW.mean((2, 3)))


class HyperConv2d(nn.Module):
    """A convolution whose kernel another network generates, from a code of the layer or of the sample.

    With `LayerCode` it is the static hypernetwork (arXiv:1609.09106): weights shared softly between layers. With
    `SampleCode`, or any module that maps x to codes, it predicts the weights for every sample (dynamic filter networks:
    De Brabandere et al. 2016, arXiv:1605.09673; their form with a filter for every position is not implemented).

    Nothing is skipped. Overhead: the code's MACs and the writer's, per sample with a sample's code, once per batch with
    a layer's; the convolution costs what an nn.Conv2d costs.

    Args:
        writer: generates the kernels; may be shared with other layers.
        code: maps x (B, C, H, W) to codes (B, code), or (1, code) for all samples.
        stride: of the convolution.
        padding: zeros on every side.
        dilation: between the taps of the kernel.
        bias: a learned bias, not a generated one.

    Raises:
        ConfigError: a size below 1 (padding below 0).
    """

    def __init__(
        self,
        writer: KernelWriter,
        code: nn.Module,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_convolution(*writer.sizes, stride, padding, dilation, 1)
        self.writer = writer
        self.encode = code  # an attribute `code` would shadow that of exported programs
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.bias = nn.Parameter(torch.zeros(1, writer.sizes[1])) if bias else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W'); H' and W' as nn.Conv2d has them."""
        kernels = self.writer(self.encode(x_BCHW))
        return conv2d_per_sample(x_BCHW, kernels, self.bias, self.stride, self.padding, self.dilation)
