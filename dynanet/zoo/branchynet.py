"""BranchyNet: LeNet, AlexNet and ResNet-110 with side branches; a sample exits where its entropy is low.

Teerapittayanon, McDanel, Kung: BranchyNet: Fast Inference via Early Exiting from Deep Neural Networks, ICPR 2016,
https://arxiv.org/abs/1709.01686. Layers, widths and positions of the branches are those of the authors' networks
(https://github.com/kunglab/branchynet): their AlexNet is CIFAR's with small kernels, and their ResNet starts with an
unpadded convolution. Convolutions have biases, as theirs do. Train with `train.MultiExit`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.architecture import architecture
from dynanet.core.errors import check_sizes
from dynanet.gates.confidence import Entropy
from dynanet.mechanisms.early_exit import EarlyExit


@architecture
def branchy_lenet(*, num_classes: int = 10, in_channels: int = 1, size: int = 28) -> EarlyExit:
    """LeNet-5 with a branch after its first convolution: two exits.

    Args:
        num_classes: width of every exit's logits.
        in_channels: channels (bands) of the input.
        size: side of the images in pixels; the authors' are MNIST's 28.

    Returns:
        An EarlyExit with entropy as confidence; (B, C, size, size) to logits (B, num_classes).

    Raises:
        ConfigError: a value out of range.
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels, size=size)
    first = _conv(in_channels, 5, 5, padding=3)
    branch = [_pool(2), nn.ReLU(), _conv(5, 10, 3), _pool(2), nn.ReLU()]
    rest = [
        *(_pool(2), nn.ReLU(), _conv(5, 10, 5, padding=3)),
        *(_pool(2), nn.ReLU(), _conv(10, 20, 5, padding=3)),
        *(_pool(2), nn.ReLU()),
    ]
    side = size + 2  # of the first convolution's answer
    deep = _pooled(_pooled(_pooled(side) + 2) + 2)
    return EarlyExit(
        [first, nn.Sequential(*rest, nn.Flatten(), nn.Linear(20 * deep**2, 84))],
        [nn.Sequential(*branch, nn.Flatten(), nn.Linear(10 * _pooled(_pooled(side)) ** 2, num_classes)),
         nn.Linear(84, num_classes)],
        Entropy(),
    )  # fmt: skip


@architecture
def branchy_alexnet(*, num_classes: int = 10, in_channels: int = 3, size: int = 32) -> EarlyExit:
    """AlexNet for CIFAR with branches after its second and third convolution: three exits.

    Args:
        num_classes: width of every exit's logits.
        in_channels: channels (bands) of the input.
        size: side of the images in pixels; the authors' are CIFAR's 32. At least 16.

    Returns:
        An EarlyExit with entropy as confidence; (B, C, size, size) to logits (B, num_classes).

    Raises:
        ConfigError: a value out of range.
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels)
    check_sizes(16, size=size)
    half = _pooled(size, 3)
    quarter = _pooled(half, 3)
    eighth = _pooled(quarter, 3)
    stages = [
        [_conv(in_channels, 32, 5), nn.ReLU(), _pool(3), _LocalNorm(), _conv(32, 64, 5)],
        [nn.ReLU(), _pool(3), _LocalNorm(), _conv(64, 96, 3)],
        [
            *(nn.ReLU(), _conv(96, 96, 3), nn.ReLU(), _conv(96, 64, 3), nn.ReLU(), _pool(3), nn.Flatten()),
            *(nn.Linear(64 * eighth**2, 256), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Linear(256, 128), nn.ReLU(), nn.Dropout(0.5)),
        ],
    ]
    branches = [
        [nn.ReLU(), _pool(3), _LocalNorm(), _conv(64, 32, 3), nn.ReLU(), _conv(32, 32, 3), nn.ReLU(), _pool(3)],
        [nn.ReLU(), _pool(3), _LocalNorm(), _conv(96, 32, 3), nn.ReLU(), _pool(3)],
    ]
    features = [32 * _pooled(quarter, 3) ** 2, 32 * _pooled(eighth, 3) ** 2]
    exits = [
        nn.Sequential(*branch, nn.Flatten(), nn.Linear(width, num_classes))
        for branch, width in zip(branches, features, strict=True)
    ]
    return EarlyExit([nn.Sequential(*stage) for stage in stages], [*exits, nn.Linear(128, num_classes)], Entropy())


@architecture
def branchy_resnet(*, num_classes: int = 10, in_channels: int = 3, size: int = 32, blocks: int = 18) -> EarlyExit:
    """ResNet-110 for CIFAR with branches after its first and its nineteenth block: three exits.

    Args:
        num_classes: width of every exit's logits.
        in_channels: channels (bands) of the input.
        size: side of the images in pixels; the authors' are CIFAR's 32. At least 23.
        blocks: residual blocks of each of the three widths 16, 32, 64, and one more at the start; the authors' 18.

    Returns:
        An EarlyExit with entropy as confidence; (B, C, size, size) to logits (B, num_classes).

    Raises:
        ConfigError: a value out of range.
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels, blocks=blocks)
    check_sizes(23, size=size)
    side = size - 2
    last = (side + 3) // 4 - 5  # after two strides and an average over 6 x 6
    wide = 32 * _pooled(side, 3) ** 2
    stem = [nn.Conv2d(in_channels, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    deep = [Residual(16 * 2**i, 32 * 2**i, 2) if n == 0 else Residual(32 * 2**i, 32 * 2**i, 1)
            for i in range(2) for n in range(blocks)]  # fmt: skip
    stages = [
        nn.Sequential(*stem, Residual(16, 16, 1)),
        nn.Sequential(*(Residual(16, 16, 1) for _ in range(blocks))),
        nn.Sequential(*deep, nn.AvgPool2d(6, 1), nn.Flatten()),
    ]
    branch = [nn.ReLU(), _LocalNorm(), _conv(16, 32, 3), nn.ReLU(), _conv(32, 32, 3), nn.ReLU(), _pool(3), nn.Flatten()]
    exits = [
        nn.Sequential(*branch, nn.Linear(wide, wide // 2), nn.Linear(wide // 2, num_classes)),
        nn.Sequential(Residual(16, 16, 1), nn.Flatten(), nn.Linear(16 * side**2, num_classes)),
        nn.Linear(64 * last**2, num_classes),
    ]
    return EarlyExit(stages, exits, Entropy())


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights: every stride-th position, zeros for the new channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs), nn.ReLU(),
            _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.stride = stride
        self.new = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride), rounded up."""
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new, 0))
        return torch.relu(self.branch(x) + shortcut)


class _LocalNorm(nn.Module):
    """x / (2 + 5e-5 * the sum of squares over three neighbouring channels)^0.75 (Krizhevsky et al. 2012, section 3.3).

    Not nn.LocalResponseNorm, which branches on an empty batch and so cannot be exported with a dynamic batch size.
    """

    def forward(self, x: Tensor) -> Tensor:
        squares = functional.pad(x * x, (0, 0, 0, 0, 1, 1))
        near = squares[:, :-2] + squares[:, 1:-1] + squares[:, 2:]
        return x * (2 + 5e-5 * near).pow(-0.75)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int | None = None) -> nn.Conv2d:
    """He initialisation, as the authors' ResNet."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2 if padding is None else padding)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _pool(kernel: int) -> nn.Module:
    """Max pooling with stride 2; windows that reach beyond the border count, as in the authors' framework."""
    return nn.MaxPool2d(kernel, 2, ceil_mode=True)


def _pooled(side: int, kernel: int = 2) -> int:
    """The side after `_pool`."""
    return max(0, -(-(side - kernel) // 2)) + 1
