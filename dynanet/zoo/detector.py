"""A small anchor-free detector of one stage, and its backbone made dynamic in two ways.

At every position of one feature map (stride 8) it predicts the class, the distances to the four sides of the box, and
how central the position is (FCOS: Tian, Shen, Chen, He, ICCV 2019, https://arxiv.org/abs/1904.01355; one level and one
small head instead of five and two towers). The backbone is a pre-activation ResNet (He et al. 2016,
https://arxiv.org/abs/1603.05027) of bottleneck units, each x + unit(x):

- `detector_static`: all units run everywhere.
- `detector_halting`: the number of units depends on the position: SACT (Figurnov et al., CVPR 2017,
  https://arxiv.org/abs/1612.02297, which puts it under Faster R-CNN).
- `detector_skip`: a gate per unit skips it for whole images (Veit and Belongie, ECCV 2018,
  https://arxiv.org/abs/1711.11503).

The answer is one tensor (B, classes + 5, h, w): class logits, logarithms of the sides in strides, a centreness logit.
`tasks.detection.decode` makes boxes of it, `tasks.detection.DetectionLoss` trains it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.errors import ConfigError, check_sizes
from dynanet.core.gate import Gate
from dynanet.gates.rules import Gumbel, StraightThrough
from dynanet.gates.scorers import ContextScorer, PooledScorer
from dynanet.mechanisms.layer_skip import BranchSkip
from dynanet.mechanisms.position_halting import PositionHalting
from dynanet.nets.blocks import conv
from dynanet.ops.tiles import Tiles

STRIDE = 8  # of the feature map: the stem and two resolutions halve


@dataclass(frozen=True)
class DetectorConfig:
    """Sizes of a detector.

    Attributes:
        num_classes: classes, background not counted.
        in_channels: channels (bands) of the input.
        widths: channels of the stem and of the two resolutions after it.
        depths: units at each of the two resolutions.
        head: channels of the head's convolution.

    Raises:
        ConfigError: a size below 1, or another number of widths or depths.
    """

    num_classes: int
    in_channels: int
    widths: Sequence[int]
    depths: Sequence[int]
    head: int

    def __post_init__(self) -> None:
        if len(self.widths) != 3 or len(self.depths) != 2:
            raise ConfigError(
                f"a detector needs three widths (stem and two resolutions) and two depths, got {tuple(self.widths)} "
                f"and {tuple(self.depths)}"
            )
        check_sizes(**vars(self))


@architecture
def detector_static(
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 32, 96),
    depths: Sequence[int] = (2, 6),
    head: int = 64,
) -> nn.Sequential:
    """The detector with every unit running everywhere; images (B, C, H, W) of any size.

    Sizes are those of `DetectorConfig`.

    Returns:
        (B, C, H, W) to (B, num_classes + 5, H / 8, W / 8), rounded up.

    Raises:
        ConfigError: as `DetectorConfig`.

    Example:
        >>> import torch
        >>> detector_static(num_classes=3)(torch.zeros(2, 3, 50, 64)).shape
        torch.Size([2, 8, 7, 8])
    """

    def stage(first: nn.Module, units: list[nn.Sequential], width: int) -> nn.Module:
        return nn.Sequential(first, *(_Added(unit) for unit in units))

    return _detector(DetectorConfig(num_classes, in_channels, widths, depths, head), stage)


@architecture
def detector_halting(  # noqa: D417 (the sizes are documented in DetectorConfig)
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 32, 96),
    depths: Sequence[int] = (2, 6),
    head: int = 64,
    eps: float = 0.01,
    bias: float = -3.0,
) -> nn.Sequential:
    """The detector whose positions halt: train it with `PositionPonderCost`.

    Sizes are those of `DetectorConfig`.

    Args:
        eps: a position halts where its scores sum to 1 - eps.
        bias: of the halting scores at the start; at -3 a position takes all units of a stage of up to 20.

    Raises:
        ConfigError: as `DetectorConfig`.
    """

    def stage(first: nn.Module, units: list[nn.Sequential], width: int) -> nn.Module:
        scores = [ContextScorer(width, bias=bias, norm=True) for _ in units]
        return PositionHalting(units, scores, Tiles(1), eps, first=first, residual=True, dilate=True)

    return _detector(DetectorConfig(num_classes, in_channels, widths, depths, head), stage)


@architecture
def detector_skip(  # noqa: D417 (the sizes are documented in DetectorConfig)
    *,
    num_classes: int,
    in_channels: int = 3,
    widths: Sequence[int] = (16, 32, 96),
    depths: Sequence[int] = (2, 6),
    head: int = 64,
    bias: float = 2.0,
    norm: bool = False,
) -> nn.Sequential:
    """The detector whose units are skipped image by image: train it with `BudgetPenalty` or `TargetRate`.

    Sizes are those of `DetectorConfig`.

    Args:
        bias: of the gates' scores at the start; positive: every unit runs at first.
        norm: normalise the gates' scores over the training data and threshold them without noise, so that every gate
            keeps depending on the image. Otherwise Gumbel noise, with which gates may become the same for all images.

    Raises:
        ConfigError: as `DetectorConfig`.
    """

    def stage(first: nn.Module, units: list[nn.Sequential], width: int) -> nn.Module:
        rule = StraightThrough if norm else Gumbel
        gates = [Gate(PooledScorer(width, bias=bias, norm=norm), rule()) for _ in units]
        return nn.Sequential(first, *(BranchSkip(unit, gate) for unit, gate in zip(units, gates, strict=True)))

    return _detector(DetectorConfig(num_classes, in_channels, widths, depths, head), stage)


class _Added(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


_Stage = Callable[[nn.Module, list[nn.Sequential], int], nn.Module]


def _detector(config: DetectorConfig, stage: _Stage) -> nn.Sequential:
    """Stem, two stages that each halve the resolution and then add units, head."""
    inputs, *rest = config.widths
    layers: list[nn.Module] = [
        conv(config.in_channels, inputs, 3, 2), nn.BatchNorm2d(inputs), nn.ReLU(inplace=True),
    ]  # fmt: skip
    for width, depth in zip(rest, config.depths, strict=True):
        layers.append(stage(conv(inputs, width, 3, 2), [_unit(width) for _ in range(depth)], width))
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        inputs = width
    return nn.Sequential(*layers, _head(inputs, config.head, config.num_classes))


def _unit(width: int) -> nn.Sequential:
    """A bottleneck branch in the order of pre-activation: normalise, activate, convolve."""
    inner = max(1, width // 2)
    return nn.Sequential(
        *(nn.BatchNorm2d(width), nn.ReLU(), conv(width, inner, 1)),
        *(nn.BatchNorm2d(inner), nn.ReLU(), conv(inner, inner, 3)),
        *(nn.BatchNorm2d(inner), nn.ReLU(), conv(inner, width, 1)),
    )


def _head(width: int, hidden: int, num_classes: int) -> nn.Sequential:
    """Two convolutions.

    Biases start so that every class has a probability of 1 % and a box is four strides wide: the focal loss needs such
    a start (Lin et al. 2017, arXiv:1708.02002, section 4.1).
    """
    last = nn.Conv2d(hidden, num_classes + 5, 3, padding=1)
    nn.init.normal_(last.weight, std=0.01)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    nn.init.constant_(last.bias[:num_classes], -log(99))
    nn.init.constant_(last.bias[num_classes : num_classes + 4], log(2))
    return nn.Sequential(conv(width, hidden, 3), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True), last)
