"""A gate that decides as it is told."""

import torch
from torch import nn

from dynanet.core.decision import Decision


class Keeps(nn.Module):
    """Keeps the first rows of a batch, the given share of them."""

    units = 1

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x):
        keep = (torch.arange(len(x)) < self.share * len(x)).float()[:, None]
        return Decision(keep, keep)
