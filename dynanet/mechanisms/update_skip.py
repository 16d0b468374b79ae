"""Update skip: a recurrent cell runs only at the time steps that call for it. First form."""

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic


class UpdateSkip(Dynamic):
    """Skip RNN (Campos et al. 2018, arXiv:1708.06834, eq. 2-6): the state is copied where the update is skipped.

    An update probability u grows by delta while updates are skipped and starts anew after one; an update happens when
    u passes 1/2, straight-through in training. The layer decides once per time step, so `stack(trace[name], 1)` is
    (B, T, 1).

    Args:
        cell: maps (x_t, h) to the next h; nn.GRUCell, say.
        inputs: features per time step.
        hidden: size of h.
    """

    def __init__(self, cell: nn.Module, inputs: int, hidden: int):
        super().__init__()
        self.cell, self.delta, self.inputs, self.hidden = cell, nn.Linear(hidden, 1), inputs, hidden
        nn.init.constant_(self.delta.bias, 1.0)  # the paper's start: updates are rarely skipped at first

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, inputs) to the last state (B, hidden)."""
        batch = x_BTD.shape[0]
        h, u, du = x_BTD.new_zeros(batch, self.hidden), x_BTD.new_ones(batch, 1), x_BTD.new_zeros(batch, 1)
        for t in range(x_BTD.shape[1]):
            hard = (u > 0.5).to(u.dtype)
            keep = self.tap(Decision(hard + (u - u.detach()) if self.training else hard, u)).keep
            h, du = self.run(0, self._update, keep[:, 0], (x_BTD[:, t], h), otherwise=(h, du))
            u = keep * du + (1 - keep) * (u + torch.minimum(du, 1 - u))
        return h

    def _update(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = self.cell(*state)
        return h, self.delta(h).sigmoid()
