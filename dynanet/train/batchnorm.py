"""Re-estimate BatchNorm statistics after training under decisions that differ from the deployed ones."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynanet.core.dynamic import evaluating
from dynanet.core.errors import DataError


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, loader: Iterable[Any], *, batches: int | None = None) -> nn.Module:
    """Re-estimate every BatchNorm's mean and variance as the plain average over batches.

    Everything else stays in eval mode, so gates decide as when deployed. In the dense form a norm sees every row; after
    `execute(model, sparse=True)` it sees only the rows that run its unit; where none do, it keeps its statistics.
    Needed where widths or resolutions share a norm (Yu and Huang 2019, US-Nets, arXiv:1903.05134), and where keeps were
    soft in training. After training in the dense form, use the dense form here too: the weights fit statistics of all
    rows, and units that few rows of a batch reach would get theirs from a small sample (on CIFAR-10 channel skip and a
    soft tree lost 11 and 14 points of held-out accuracy with the sparse form, none with the dense one).

    Args:
        model: changed in place; only the norms' statistics change.
        loader: batches, or (batch, labels, ...) of which the first is used. Without augmentation, in any order.
        batches: how many; None for all.

    Returns:
        The model.

    Raises:
        DataError: the loader is empty.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return model
    before = {norm: ({k: v.clone() for k, v in norm.named_buffers()}, norm.momentum) for norm in norms}
    seen = 0
    try:
        with evaluating(model):
            for batch in islice(loader, batches):
                if not seen:
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.momentum = None  # None: the cumulative average
                        norm.train()
                model(batch[0] if isinstance(batch, tuple | list) else batch)
                seen += 1
    finally:
        for norm, (statistics, momentum) in before.items():
            norm.momentum = momentum
            if norm.num_batches_tracked == 0:
                norm.load_state_dict(statistics, strict=False)
    if not seen:
        raise DataError("no batch came to recalibrate BatchNorm with; give a loader with at least one")
    return model
