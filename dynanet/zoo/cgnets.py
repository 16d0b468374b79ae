"""A residual network for small images whose convolutions read some input channels first, the others where needed.

ResNet-18 for CIFAR (He et al., https://arxiv.org/abs/1512.03385) with the channel gating of Hua, Zhou, De Sa, Zhang,
Suh: Channel Gating Neural Networks, NeurIPS 2019, https://arxiv.org/abs/1805.12549.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, check_sizes
from dynanet.mechanisms.channel_gating import ChannelGating
from dynanet.nets.blocks import conv, conv_bn, conv_bn_relu
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
        groups: groups of output channels that decide together; each has a base path that reads other channels.
        tile: side of the tiles for which stride-1 convolutions decide; the other convolutions decide per image.
        threshold: initial value of the thresholds.

    Returns:
        A network whose blocks hold two `ChannelGating` each; stem, shortcuts and classifier always run.

    Raises:
        ConfigError: a share outside (0, 1), not one depth per width, or groups that do not divide a width.
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels)
    if not 0 < share < 1:
        raise ConfigError(f"share must be a share of the input channels between 0 and 1, got {share}")
    if not widths or len(widths) != len(depths):
        raise ConfigError(f"{len(widths)} widths and {len(depths)} depths; expected one depth per width")
    check_sizes(widths=widths, depths=depths, groups=groups, tile=1 if tile is None else tile)
    if any(width % groups for width in widths):
        raise ConfigError(f"groups must divide every width of {tuple(widths)}, got {groups}")

    def gated(inputs: int, outputs: int, stride: int) -> ChannelGating:
        tiles = Tiles(tile, 1) if tile is not None and stride == 1 else None
        base = min(max(1, round(share * inputs)), inputs - 1)
        return ChannelGating(conv(inputs, outputs, 3, stride), base, groups=groups, tiles=tiles, threshold=threshold)

    blocks: list[nn.Module] = []
    inputs = widths[0]
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for d in range(depth):
            stride = 2 if i and not d else 1
            shortcut: nn.Module = nn.Identity()
            if stride != 1 or inputs != width:
                shortcut = conv_bn(inputs, width, 1, stride)
            blocks.append(GatedBlock(gated(inputs, width, stride), gated(width, width, 1), shortcut))
            inputs = width
    stem = conv_bn_relu(in_channels, widths[0], 3)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


class GatedBlock(nn.Module):
    """Two gated convolutions, which contain their norms, and a shortcut."""

    def __init__(self, first: nn.Module, second: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        return (self.second(self.first(x).relu()) + self.shortcut(x)).relu()
