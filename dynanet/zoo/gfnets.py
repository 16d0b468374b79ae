"""GFNet: first the downsized image, then crops of the full one that a policy places, until the confidence suffices.

Wang, Lv, Huang, Song, Yang, Huang: Glance and Focus: a Dynamic Approach to Reducing Spatial Redundancy in Image
Classification, NeurIPS 2020, https://arxiv.org/abs/2010.05300.
"""

from collections.abc import Sequence

from torch import nn

from dynanet.core.architecture import architecture
from dynanet.mechanisms.glance_focus import GlanceFocus, PlacePolicy, RecurrentHead
from dynanet.nets.resnet import cifar_blocks, cifar_stem, imagenet_blocks, imagenet_stem


@architecture
def gfnet(
    *,
    num_classes: int,
    in_channels: int = 3,
    glance_size: int = 16,
    crop_size: int = 16,
    glimpses: int = 3,
    depth: int = 8,
    widths: Sequence[int] = (16, 32, 64),
    hidden: int = 64,
    policy_hidden: int = 32,
) -> GlanceFocus:
    """GFNet for small images: (B, C, H, W) of any size to (B, num_classes).

    Args:
        num_classes: width of every glimpse's logits.
        in_channels: channels of the input.
        glance_size: side to which the whole image is resized.
        crop_size: side of the crops, in pixels of the image.
        glimpses: largest number of steps, the glance included.
        depth: of both encoders, 6n + 2 with the head they share.
        widths: channels at each resolution of both encoders.
        hidden: state size of the recurrent head.
        policy_hidden: state size of the policy.

    Returns:
        A GlanceFocus with one step per glimpse. A new one runs all of them; `calibrate.calibrate` finds thresholds.

    Raises:
        ConfigError: a depth that is not 6n + 2, sizes or a number of glimpses below 1.

    Example:
        >>> import torch
        >>> model = gfnet(num_classes=10)
        >>> [tuple(logits.shape) for logits in model.answers(torch.zeros(2, 3, 32, 32))]
        [(2, 10), (2, 10), (2, 10)]
    """

    def encoder() -> nn.Sequential:
        return nn.Sequential(cifar_stem(in_channels, widths[0]), *cifar_blocks(depth, widths))

    return GlanceFocus(
        glance=encoder(),
        focus=encoder(),
        policy=PlacePolicy(widths[-1], hidden=policy_hidden),
        head=RecurrentHead(widths[-1], hidden, num_classes),
        glance_size=glance_size,
        crop_size=crop_size,
        glimpses=glimpses,
    )


@architecture
def gfnet_imagenet(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    glance_size: int = 96,
    crop_size: int = 96,
    glimpses: int = 5,
    depth: int = 50,
    hidden: int = 1024,
    policy_hidden: int = 256,
) -> GlanceFocus:
    """GFNet on ResNets, for images of about 224 x 224 pixels.

    Args:
        num_classes: as in `gfnet`.
        in_channels: as in `gfnet`.
        glance_size: as in `gfnet`; the authors' ResNet-50 has 96 or 128, here and for the crops.
        crop_size: as in `gfnet`.
        glimpses: as in `gfnet`.
        depth: of both encoders: 50, 101 or 152 with the head.
        hidden: state size of the recurrent head; the authors' is 1,024.
        policy_hidden: state size of the policy.

    Returns:
        As `gfnet`.

    Raises:
        ConfigError: another depth, sizes or a number of glimpses below 1.
    """

    def encoder() -> nn.Sequential:
        return nn.Sequential(imagenet_stem(in_channels), *imagenet_blocks(depth))

    return GlanceFocus(
        glance=encoder(),
        focus=encoder(),
        policy=PlacePolicy(2048, width=32, hidden=policy_hidden, grid=3),
        head=RecurrentHead(2048, hidden, num_classes),
        glance_size=glance_size,
        crop_size=crop_size,
        glimpses=glimpses,
    )
