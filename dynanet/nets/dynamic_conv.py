"""Dynamic convolution: attention over a few kernels, with a temperature that training lowers."""

from torch import Tensor, nn

from dynanet.core.errors import ConfigError, check_sizes
from dynanet.nets.condconv import check_convolution, conv2d_per_sample, kernel_bank, mix_kernels


class DynamicConv2d(nn.Module):
    """DY-CNN (Chen et al. 2020, arXiv:1912.03458, sec. 3): kernels mixed by a softmax with a temperature.

    Pool, linear, ReLU, linear, softmax(. / temperature) gives every sample its shares of `kernels` kernels and biases.
    A high temperature makes the shares nearly equal, so that at first all kernels learn; the paper lowers it linearly
    from 30 to 1 over the first epochs: `train.anneal_temperature(model, train.linear(30.0, 1.0, share=0.1))`.

    Nothing is skipped. Overhead per sample, in MACs: in_channels x hidden + hidden x kernels for the attention, and
    kernels x (number of weights and biases of one kernel) for the mixing. Parameters: `kernels` times as many.

    Args:
        in_channels: of x (B, in_channels, H, W).
        out_channels: of the output.
        kernel_size: side of the square kernel.
        kernels: number of kernels to mix; the paper's is 4.
        reduction: the attention's hidden layer has in_channels / reduction units (1 at least).
        temperature: of the softmax, in training and in eval mode. Not part of the state dict: end the annealing at the
            value of a new layer.
        stride: of the convolution.
        padding: zeros on every side.
        dilation: between the taps of the kernel.
        groups: of the convolution.
        bias: one learned bias per kernel, mixed like the kernels.

    Raises:
        ConfigError: a size below 1 (padding below 0), a temperature that is not above 0, or channels that the groups do
            not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        kernels: int = 4,
        reduction: int = 4,
        temperature: float = 1.0,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_convolution(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        check_sizes(kernels=kernels, reduction=reduction)
        if not temperature > 0:
            raise ConfigError(f"temperature must be above 0, got {temperature}")
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.groups = groups
        self.temperature = temperature
        self.weight, self.bias = kernel_bank(kernels, in_channels // groups, out_channels, kernel_size, bias=bias)
        hidden = max(1, in_channels // reduction)
        self.attend = nn.Sequential(nn.Linear(in_channels, hidden), nn.ReLU(), nn.Linear(hidden, kernels))

    def attention(self, x_BCHW: Tensor) -> Tensor:
        """The share of every kernel for a sample: (B, kernels), each row sums to 1."""
        return (self.attend(x_BCHW.mean((2, 3))) / self.temperature).softmax(1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H', W'); H' and W' as nn.Conv2d has them."""
        weight, bias = mix_kernels(self.attention(x_BCHW), self.weight, self.bias)
        return conv2d_per_sample(x_BCHW, weight, bias, self.stride, self.padding, self.dilation, self.groups)
