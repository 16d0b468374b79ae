"""Layers that many networks share, initialised as their papers do."""

from torch import Tensor, nn
from torch.nn import functional


def conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, *, dilation: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A padded convolution with He initialisation by fan-out (He et al. 2015, arXiv:1502.01852); biases start at 0."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, *, dilation: int = 1) -> nn.Sequential:
    """`conv` and a batch norm."""
    return nn.Sequential(conv(inputs, outputs, kernel, stride, dilation=dilation), nn.BatchNorm2d(outputs))


def conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """`conv`, a batch norm and a ReLU."""
    return nn.Sequential(*conv_bn(inputs, outputs, kernel, stride), nn.ReLU(inplace=True))


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with `init_truncated`."""
    layer = nn.Linear(inputs, outputs)
    init_truncated(layer)
    return layer


def init_truncated(*layers: nn.Module) -> None:
    """Draw weights as vision transformers do, from a truncated normal of deviation 0.02; set biases to 0."""
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)


def init_normal(*layers: nn.Module) -> None:
    """Draw weights as BERT and GPT-2 do, from a normal of deviation 0.02; set the biases of linear layers to 0."""
    for layer in layers:
        assert isinstance(layer, nn.Linear | nn.Embedding)
        nn.init.normal_(layer.weight, std=0.02)
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)


def classifier(inputs: int, num_classes: int) -> nn.Linear:
    """A linear layer whose biases start at 0."""
    layer = nn.Linear(inputs, num_classes)
    nn.init.zeros_(layer.bias)
    return layer


def pooled_classifier(inputs: int, num_classes: int) -> nn.Sequential:
    """Global average pooling and a linear layer: (B, inputs, H, W) to (B, num_classes)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier(inputs, num_classes))


def resized(x: Tensor, like: Tensor, *, align_corners: bool = False) -> Tensor:
    """(B, C, H, W) resized bilinearly to the height and width of another tensor."""
    return functional.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=align_corners)
