"""The sizes of vision transformers, which their builders share."""

from dataclasses import dataclass

from torch import Tensor

from dynanet.core.errors import ConfigError, InputError, check_sizes


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer for images of one size.

    Attributes:
        num_classes: width of the logits.
        in_channels: channels (bands) of the input.
        size: side of the images in pixels; positions are learned, so other sizes are refused.
        patch: side of a patch in pixels, which becomes a token; it divides `size`.
        width: features of a token.
        depth: blocks.
        heads: attention heads; they divide `width`.
        expansion: ratio of a block's hidden layer to `width`.

    Raises:
        ConfigError: a size below 1, or a patch or heads that do not divide.
    """

    num_classes: int
    in_channels: int
    size: int
    patch: int
    width: int
    depth: int
    heads: int
    expansion: int

    def __post_init__(self) -> None:
        check_sizes(**vars(self))
        check_heads(self.width, self.heads)
        if self.size % self.patch:
            raise ConfigError(f"size must be a multiple of patch = {self.patch}, got {self.size}")

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.size // self.patch) ** 2

    def check_images(self, x_BCHW: Tensor) -> None:
        """Refuse images of another size.

        Raises:
            InputError: naming both sizes.
        """
        expected = (self.in_channels, self.size, self.size)
        if x_BCHW.shape[1:] != expected:
            raise InputError(f"images of {tuple(x_BCHW.shape[1:])}; this network takes {expected}: resize them")


def check_heads(width: int, heads: int) -> None:
    """Check that attention heads divide the width.

    Raises:
        ConfigError: they do not.
    """
    if width % heads:
        raise ConfigError(f"width must be a multiple of heads = {heads}, got {width}")
