"""Networks from papers, one per file, each readable on its own; `load_reference` fills one from its authors' weights.

`MODELS` are the functions that build them, by name.
"""

from dynanet.zoo.msdnet import msdnet, msdnet_anytime, msdnet_imagenet
from dynanet.zoo.reference import load_reference
from dynanet.zoo.spectral import scene_form, scene_macs, spectral_exit, spectral_static
from dynanet.zoo.staged_resnet import staged_resnet, static_resnet

MODELS = {
    build.__name__: build
    for build in (
        msdnet, msdnet_anytime, msdnet_imagenet, spectral_exit, spectral_static, staged_resnet, static_resnet
    )
}  # fmt: skip

__all__ = [*MODELS, "load_reference", "scene_form", "scene_macs"]
