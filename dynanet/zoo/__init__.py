"""Networks from papers, one per file, each readable on its own; `load_reference` fills one from its authors' weights.

`__all__` is the list of models, and `load_reference`.
"""

from dynanet.zoo.msdnet import msdnet, msdnet_anytime, msdnet_imagenet
from dynanet.zoo.reference import load_reference
from dynanet.zoo.staged_resnet import staged_resnet, static_resnet

__all__ = ["load_reference", "msdnet", "msdnet_anytime", "msdnet_imagenet", "staged_resnet", "static_resnet"]
