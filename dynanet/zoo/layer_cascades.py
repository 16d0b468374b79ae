"""A small network for street scenes in which easy pixels are labelled early, and the same network without exits.

Deep layer cascade of Li, Liu, Luo, Loy, Tang: Not All Pixels Are Equal, CVPR 2017, https://arxiv.org/abs/1704.01344,
whose backbone (an Inception-ResNet-v2 cut in three) was never published. Here, a residual encoder that goes down to a
sixteenth of the resolution and up again to a quarter labels every position; two stages of residual cells at a quarter,
each with its own classifier, continue with the positions below the threshold. Images of any size.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, check_sizes
from dynanet.mechanisms.pixel_cascade import PixelCascade
from dynanet.nets.blocks import conv_bn, conv_bn_relu, resized
from dynanet.nets.resnet import basic_block


@architecture
def layer_cascade(
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = (32, 64, 96, 128),
    cells: Sequence[int] = (2, 2),
    dilations: Sequence[int] = (1, 2),
) -> PixelCascade:
    """A segmentation network with an exit for every position; images (B, C, H, W) of any size.

    At 180 x 240 pixels the full network takes 1.06 G MACs and the first exit 0.26 G.

    Args:
        num_classes: width of the logits.
        in_channels: channels (bands) of the input.
        widths: channels at a half, a quarter, an eighth and a sixteenth of the image; the second is the stages'.
        cells: residual cells in every later stage.
        dilations: of the 3x3 convolutions in every later stage.

    Returns:
        A PixelCascade; logits are (B, num_classes, H, W).

    Raises:
        ConfigError: a value out of range, not four rising widths, or not one dilation per stage.

    Example:
        >>> import torch
        >>> model = layer_cascade(num_classes=11)
        >>> model(torch.zeros(1, 3, 45, 61)).shape
        torch.Size([1, 11, 45, 61])
    """
    _check(widths, cells, dilations, num_classes, in_channels)
    stages = [[_cell(widths[1], d) for _ in range(count)] for count, d in zip(cells, dilations, strict=True)]
    exits = [_exit(widths[1], num_classes) for _ in range(1 + len(stages))]
    return PixelCascade(Encoder(in_channels, widths), stages, exits)


@architecture
def layer_cascade_static(
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = (32, 64, 96, 128),
    cells: Sequence[int] = (2, 2),
    dilations: Sequence[int] = (1, 2),
    width_multiplier: float = 1.0,
) -> nn.Module:
    """The same backbone and stages with the last exit only: the static network to compare with.

    Args:
        num_classes: width of the logits.
        in_channels: as in `layer_cascade`.
        widths: as in `layer_cascade`.
        dilations: as in `layer_cascade`.
        cells: as in `layer_cascade`; an empty list gives the cascade's first exit.
        width_multiplier: scales every width, rounded to whole channels.

    Returns:
        (B, C, H, W) -> (B, num_classes, H, W).

    Raises:
        ConfigError: as `layer_cascade`.
    """
    widths = [max(1, round(width * width_multiplier)) for width in widths]
    _check(widths, cells, dilations, num_classes, in_channels)
    residuals = [_Add(_cell(widths[1], d)) for count, d in zip(cells, dilations, strict=True) for _ in range(count)]
    return _Upsampled(nn.Sequential(Encoder(in_channels, widths), *residuals, _exit(widths[1], num_classes)))


class Encoder(nn.Module):
    """Images to features at a quarter of their size, with context from a sixteenth.

    Args:
        in_channels: of the image.
        widths: at a half, a quarter, an eighth and a sixteenth.
    """

    def __init__(self, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        half, quarter, eighth, sixteenth = widths
        self.fine = nn.Sequential(*conv_bn_relu(in_channels, half, 3, 2), *conv_bn_relu(half, quarter, 3, 2))
        self.middle = basic_block(quarter, eighth, stride=2)
        self.coarse = nn.Sequential(basic_block(eighth, sixteenth, stride=2), basic_block(sixteenth, sixteenth))
        self.from_middle = conv_bn(eighth, quarter, 1)
        self.from_coarse = conv_bn(sixteenth, quarter, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, widths[1], H / 4, W / 4), rounded up."""
        fine = self.fine(x_BCHW)
        middle = self.middle(fine)
        coarse = self.from_coarse(self.coarse(middle))
        middle = self.from_middle(middle) + resized(coarse, middle)
        return functional.relu(fine + resized(middle, fine))


class _Add(nn.Module):
    """x + cell(x)."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cell(x)


class _Upsampled(nn.Module):
    """Logits at the image's size."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return resized(self.net(x_BCHW), x_BCHW)


def _cell(width: int, dilation: int) -> nn.Sequential:
    """Two 3x3 convolutions, whose second norm starts at zero.

    A new stage is therefore the identity, and its exit starts as good as the one before.
    """
    first = conv_bn(width, width, 3, dilation=dilation)
    second = conv_bn(width, width, 3, dilation=dilation)
    assert isinstance(second[1].weight, Tensor)
    nn.init.zeros_(second[1].weight)
    return nn.Sequential(*first, nn.ReLU(inplace=True), *second)


def _exit(width: int, num_classes: int) -> nn.Conv2d:
    head = nn.Conv2d(width, num_classes, 1)
    nn.init.normal_(head.weight, std=0.01)
    assert head.bias is not None
    nn.init.zeros_(head.bias)
    return head


def _check(
    widths: Sequence[int], cells: Sequence[int], dilations: Sequence[int], num_classes: int, in_channels: int
) -> None:
    if len(widths) != 4 or sorted(widths) != list(widths):
        raise ConfigError(f"widths must be four, none smaller than the one before, got {tuple(widths)}")
    if len(cells) != len(dilations):
        raise ConfigError(f"{len(cells)} stages and {len(dilations)} dilations; expected one of each per stage")
    check_sizes(widths=widths, cells=cells, dilations=dilations, num_classes=num_classes, in_channels=in_channels)
