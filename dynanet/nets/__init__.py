"""Static backbones and layers in plain torch, of which the zoo and the mechanisms are built."""

from dynanet.nets.blocks import (
    classifier,
    conv,
    conv_bn,
    conv_bn_relu,
    init_normal,
    init_truncated,
    linear,
    pooled_classifier,
    resized,
)
from dynanet.nets.condconv import CondConv2d, check_convolution, conv2d_per_sample, kernel_bank, mix_kernels
from dynanet.nets.dynamic_conv import DynamicConv2d
from dynanet.nets.dynamic_relu import DynamicReLU
from dynanet.nets.hypernetwork import HyperConv2d, KernelWriter, LayerCode, SampleCode
from dynanet.nets.moefication import balanced_clusters, fit_router
from dynanet.nets.multiscale import ConvExit, finest_scale, grow_conv
from dynanet.nets.resnet import (
    PadShortcut,
    Residual,
    basic_block,
    bottleneck,
    cifar_blocks,
    cifar_resnet,
    cifar_stem,
    head,
    imagenet_blocks,
    imagenet_resnet,
    imagenet_stem,
)
from dynanet.nets.slim import (
    PlainResidual,
    Slim,
    SlimBatchNorm2d,
    SlimConv2d,
    SlimLinear,
    SlimResidual,
    SlimSequential,
    scaled,
)
from dynanet.nets.spatial_transformer import Resize, SpatialTransformer, affine, crop, resize, sides
from dynanet.nets.spectral import PatchExit, PixelExit, ResidualBlock, SpectralStem, spectral_net
from dynanet.nets.squeeze_excite import SqueezeExcite
from dynanet.nets.switchable_norm import norms_apart

__all__ = [
    "CondConv2d", "ConvExit", "DynamicConv2d", "DynamicReLU", "HyperConv2d", "KernelWriter", "LayerCode", "PadShortcut",
    "PatchExit", "PixelExit", "PlainResidual", "Residual", "ResidualBlock", "Resize", "SampleCode", "Slim",
    "SlimBatchNorm2d", "SlimConv2d", "SlimLinear", "SlimResidual", "SlimSequential", "SpatialTransformer",
    "SpectralStem", "SqueezeExcite", "affine", "balanced_clusters", "basic_block", "bottleneck", "check_convolution",
    "cifar_blocks", "cifar_resnet", "cifar_stem", "classifier", "conv", "conv2d_per_sample", "conv_bn", "conv_bn_relu",
    "crop", "finest_scale", "fit_router", "grow_conv", "head", "imagenet_blocks", "imagenet_resnet", "imagenet_stem",
    "init_normal", "init_truncated", "kernel_bank", "linear", "mix_kernels", "norms_apart", "pooled_classifier",
    "resize", "resized", "scaled", "sides", "spectral_net",
]  # fmt: skip
