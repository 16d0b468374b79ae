"""Dynamic ReLU: a piecewise linear activation whose slopes and intercepts depend on the sample."""

import torch
from torch import Tensor, nn

from dynanet.core.errors import check_sizes


class DynamicReLU(nn.Module):
    """DY-ReLU (Chen et al. 2020, arXiv:2003.10027, sec. 3): y = max over k of a_k x + b_k, with a and b of the sample.

    A pooled two-layer network predicts residuals in (-1, 1); slopes are the initial ones plus 1.0 times theirs,
    intercepts 0 plus 0.5 times theirs. The initial slopes are 1 for the first piece and 0 for the others, and the last
    layer starts at zero: a new layer is a ReLU. Form A (`per_channel=False`) shares the pieces over all channels,
    form B has its own for each; form C, which also depends on the position, is not implemented.

    Nothing is skipped. Overhead per sample, in MACs: channels x hidden + hidden x 2 pieces (x channels in form B), with
    hidden = channels / reduction. Applying the pieces takes pieces x channels x H x W multiplications, which are not
    counted as MACs, like those of every activation.

    Args:
        channels: of x (B, channels, H, W), or (B, channels).
        pieces: linear pieces; the paper's is 2.
        reduction: the hidden layer has channels / reduction units (1 at least).
        per_channel: form B instead of form A.

    Raises:
        ConfigError: fewer than 2 pieces (1 is a linear map), or a size below 1.
    """

    start: Tensor
    reach: Tensor

    def __init__(self, channels: int, *, pieces: int = 2, reduction: int = 8, per_channel: bool = True) -> None:
        super().__init__()
        check_sizes(channels=channels, reduction=reduction)
        check_sizes(2, pieces=pieces)
        self.pieces = pieces
        self.channels = channels if per_channel else 1
        hidden = max(1, channels // reduction)
        self.predict = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * pieces * self.channels)
        )
        last = self.predict[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        # Slopes, then intercepts. Buffers, so that these constants follow the layer's dtype and device.
        start = torch.tensor([1.0] + [0.0] * (2 * pieces - 1))
        reach = torch.tensor([1.0] * pieces + [0.5] * pieces)
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("reach", reach, persistent=False)

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slopes and intercepts for each sample, each (B, channels or 1, pieces)."""
        pooled = x.flatten(2).mean(2) if x.dim() > 2 else x
        residual = 2 * self.predict(pooled).sigmoid() - 1
        theta = self.start + self.reach * residual.reshape(x.shape[0], self.channels, 2 * self.pieces)
        return theta[..., : self.pieces], theta[..., self.pieces :]

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, ...) to the same shape."""
        slopes, intercepts = self.coefficients(x)
        shape = (*slopes.shape[:2], *[1] * (x.dim() - 2))
        y = slopes[..., 0].reshape(shape) * x + intercepts[..., 0].reshape(shape)
        for k in range(1, self.pieces):
            y = torch.maximum(y, slopes[..., k].reshape(shape) * x + intercepts[..., k].reshape(shape))
        return y
