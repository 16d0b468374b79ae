"""The pixel classifier for hyperspectral scenes, as a patch network with exits and as a scene network.

The first exit reads the pixel's own spectrum, later ones its neighbourhood. `nets.spectral` has the layers. Exits as
in BranchyNet (arXiv:1709.01686).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynanet.core.architecture import architecture
from dynanet.core.cost import CostModel
from dynanet.core.errors import StructureError
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.scene_exit import SceneExit
from dynanet.nets.spectral import PixelExit, spectral_net


@architecture
def spectral_exit(
    *,
    num_classes: int,
    in_channels: int = 200,
    width: int = 48,
    hidden: int = 64,
    blocks: Sequence[Sequence[Sequence[int]]] = (((64, 2), (64, 1)), ((64, 1),)),
) -> EarlyExit:
    """A classifier of pixel patches (B, bands, P, P), P odd, with an exit per stage.

    Args:
        num_classes: width of every exit's logits.
        in_channels: bands.
        width: channels of the per-pixel stem.
        hidden: units of the first exit's hidden layer.
        blocks: for every later stage its residual blocks, each (channels, stride).

    Returns:
        An EarlyExit; logits are (B, num_classes).
    """
    shapes = [[(channels, stride) for channels, stride in stage] for stage in blocks]
    return EarlyExit(*spectral_net(in_channels, num_classes, width, hidden, shapes))


@architecture
def spectral_static(
    *,
    num_classes: int,
    in_channels: int = 200,
    width: int = 48,
    blocks: Sequence[Sequence[Sequence[int]]] = (((64, 2), (64, 1)), ((64, 1),)),
) -> nn.Sequential:
    """The same backbone with its last exit only: the static network to compare with.

    Arguments are as in `spectral_exit`.
    """
    shapes = [[(channels, stride) for channels, stride in stage] for stage in blocks]
    stages, exits = spectral_net(in_channels, num_classes, width, 1, shapes)
    return nn.Sequential(*stages, exits[-1])


def scene_form(model: nn.Module, patch: int = 9) -> SceneExit:
    """A trained `spectral_exit`, run over whole images: (B, bands, H, W) to logits (B, H, W, classes).

    The stem runs once over the image, and patches of its features are cut for the pixels that continue. Weights are
    shared with the model; thresholds are copied.

    Args:
        model: made by `spectral_exit`.
        patch: side of the patches that it was trained on.

    Raises:
        StructureError: another kind of model.
    """
    if not isinstance(model, EarlyExit) or not isinstance(first := model.exits[0], PixelExit):
        raise StructureError("a scene form needs a model of spectral_exit, whose first exit reads single pixels")
    return SceneExit.of(model, OfPixels(first), patch)


@torch.no_grad()
def scene_macs(model: nn.Module, image: Tensor, patch: int = 9) -> list[float]:
    """MACs per pixel of a scene that leaves at each exit, the stem run once per pixel.

    Args:
        model: made by `spectral_exit`.
        image: (1, bands, H, W), any small part of a scene.
        patch: side of the patches.
    """
    cost = CostModel(scene_form(model, patch), image)
    pixels = image.shape[2] * image.shape[3]
    later = [cost.unit[""][0].item(), *cost.unit.get("rest", torch.zeros(0)).tolist()]
    return (cost.always / pixels + torch.tensor([0.0, *later], dtype=torch.float64).cumsum(0)).tolist()


class OfPixels(nn.Module):
    """A pixel exit that takes features (pixels, C) instead of patches."""

    def __init__(self, exit_: PixelExit) -> None:
        super().__init__()
        self.exit = exit_

    def forward(self, features: Tensor) -> Tensor:
        """Features (pixels, C) to logits (pixels, classes)."""
        return self.exit.of_pixels(features)
