"""A residual network for small images whose convolutions look at some input channels before they ask for the others.

ResNet-18 for CIFAR (He et al., https://arxiv.org/abs/1512.03385) with the channel gating of Hua, Zhou, De Sa, Zhang,
Suh: Channel Gating Neural Networks, NeurIPS 2019, https://arxiv.org/abs/1805.12549.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, check_sizes
from dynanet.mechanisms.channel_gating import ChannelGating
from dynanet.ops.tiles import Tiles


@architecture
def cgnet(
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
    share: float = 0.25,
    groups: int = 1,
    tile: int | None = None,
    threshold: float = -0.5,
) -> nn.Sequential:
    """ResNet-18 with gated 3x3 convolutions: (B, C, H, W) to logits (B, num_classes).

    Args:
        num_classes: width of the logits.
        in_channels: channels of the input.
        widths: channels at each resolution; every one after the first halves height and width.
        depths: blocks at each resolution.
        share: of the input channels in the base path; a quarter in the paper's CIFAR networks.
        groups: output channels decide in so many groups, each with a base path that reads other channels.
        tile: stride-1 convolutions decide for tiles of this side; those with a stride decide per image.
        threshold: where the thresholds start.

    Returns:
        A network whose blocks hold two `ChannelGating` each; stem, shortcuts and classifier always run.

    Raises:
        ConfigError: a share outside (0, 1), not one depth per width, or groups that do not divide a width.
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels)
    if not 0 < share < 1:
        raise ConfigError(f"cgnet: share is {share}; expected a share of the input channels between 0 and 1")
    if not widths or len(widths) != len(depths) or min((*widths, *depths)) < 1:
        raise ConfigError(
            f"cgnet: widths are {tuple(widths)} and depths {tuple(depths)}; expected one depth per width, all above 0"
        )
    if groups < 1 or any(width % groups for width in widths) or (tile is not None and tile < 1):
        raise ConfigError(
            f"cgnet: {groups} groups and tiles of {tile} with widths {tuple(widths)}; groups must divide every width, "
            f"and tiles have a side of 1 or more"
        )

    def gated(inputs: int, outputs: int, stride: int) -> ChannelGating:
        conv = _conv(inputs, outputs, 3, stride)
        tiles = Tiles(tile, 1) if tile is not None and stride == 1 else None
        base = min(max(1, round(share * inputs)), inputs - 1)
        return ChannelGating(conv, base, groups=groups, tiles=tiles, threshold=threshold)

    blocks: list[nn.Module] = []
    inputs = widths[0]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for d in range(depth):
            stride = 2 if i and not d else 1
            shortcut: nn.Module = nn.Identity()
            if stride != 1 or inputs != width:
                shortcut = nn.Sequential(_conv(inputs, width, 1, stride), nn.BatchNorm2d(width))
            blocks.append(GatedBlock(gated(inputs, width, stride), gated(width, width, 1), shortcut))
            inputs = width
    stem = nn.Sequential(_conv(in_channels, widths[0], 3, 1), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


class GatedBlock(nn.Module):
    """Two gated convolutions, which hold their norms, and a shortcut."""

    def __init__(self, first: nn.Module, second: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = first, second, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        return (self.second(self.first(x).relu()) + self.shortcut(x)).relu()


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
