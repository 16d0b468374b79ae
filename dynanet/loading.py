"""`dynanet.load`: a saved model, back from its folder."""

from pathlib import Path

from torch import nn

from dynanet import zoo
from dynanet.export import bundle


def load(folder: str | Path) -> nn.Module:
    """Load a model that `export.bundle` saved. Nothing in the folder is executed.

    Raises:
        BundleError: a folder that is no bundle, or one that is damaged or altered.
    """
    return bundle.load(folder, {name: getattr(zoo, name) for name in zoo.__all__ if name != "load_reference"})
