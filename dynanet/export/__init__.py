"""Saved models as safetensors and JSON, verified on loading; never a pickle."""

from dynanet.export.bundles import bundle as bundle
from dynanet.export.card import Card as Card
from dynanet.export.config import Inputs as Inputs
