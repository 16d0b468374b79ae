"""Squeeze and excitation: channels are scaled by weights that depend on the whole image."""

from torch import Tensor, nn

from dynanet.core.errors import check_sizes


class SqueezeExcite(nn.Module):
    """x times sigmoid(linear(ReLU(linear(pool(x))))), channel by channel (Hu et al. 2018, arXiv:1709.01507, eq. 2-4).

    Equivalent to weights that depend on the sample, as scaling the output channels of a convolution scales its kernels.
    Nothing is skipped; channels near 0 are computed as well. Overhead per sample:
    2 x channels x (channels / reduction) MACs.

    Args:
        channels: of x (B, channels, H, W).
        reduction: the hidden layer has channels / reduction units (1 at least); the paper's is 16.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        check_sizes(channels=channels, reduction=reduction)
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def scale(self, x_BCHW: Tensor) -> Tensor:
        """The factor of every channel, (B, channels), each in (0, 1)."""
        return self.excite(self.squeeze(x_BCHW.mean((2, 3))).relu()).sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape."""
        return x_BCHW * self.scale(x_BCHW)[:, :, None, None]
