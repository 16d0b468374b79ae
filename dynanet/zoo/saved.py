"""`dynanet.load`: loading a saved model from its folder."""

from pathlib import Path

from torch import nn

from dynanet import zoo
from dynanet.export.bundles import Bundle
from dynanet.export.bundles import load as load_bundle
from dynanet.export.bundles import read as read_bundle


def load(folder: str | Path) -> nn.Module:
    """Load a model that `export.bundle` saved. Nothing in the folder is executed.

    Raises:
        BundleError: not a bundle, or one that is damaged or altered.
    """
    return load_bundle(folder, zoo.MODELS)


def read(folder: str | Path) -> Bundle:
    """Load a model together with its classes, inputs and measured cost.

    Raises:
        BundleError: as `load`.
    """
    return read_bundle(folder, zoo.MODELS)
