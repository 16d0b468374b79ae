"""Update skip: a recurrent cell runs only at the time steps that call for it; at the others its state is copied."""

from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.data.ragged import Sequences, as_sequences


class UpdateSkip(Dynamic):
    """Skip RNN (Campos et al. 2018, arXiv:1708.06834, section 3).

    An update probability u starts at 1. While updates are skipped it grows by delta = sigmoid(W s + b) of the state s,
    cut off at 1; after an update it starts anew at delta. An update happens when u passes 1/2, and the gradient of that
    rounding is taken to be 1. As delta depends on the state alone, a skipped step computes nothing.

    The layer decides once per time step, so `torch.stack(trace[name], 1)` is (B, T, 1). Rows whose sequence has ended
    decide 0, whatever is forced: padding costs nothing.

    `UpdateCost` is the term of the loss that makes updates rare.

    Args:
        cell: maps (x_t, state) to the next state: nn.GRUCell, nn.RNNCell, or any module like these. The state of an
            nn.LSTMCell is the pair (h, c).
        inputs: features per time step.
        hidden: size of the state; of h and c each.
        every_step: answer the states of all steps instead of the last one: for recurrent layers on top of each other.

    Raises:
        ConfigError: sizes below 1.
    """

    def __init__(self, cell: nn.Module, inputs: int, hidden: int, *, every_step: bool = False):
        super().__init__()
        if min(inputs, hidden) < 1:
            raise ConfigError(f"update skip from {inputs} inputs to {hidden} hidden features; both must be at least 1")
        self.cell, self.delta, self.inputs, self.hidden = cell, nn.Linear(hidden, 1), inputs, hidden
        self.every_step = every_step
        nn.init.constant_(self.delta.bias, 1.0)  # the paper's start: updates are rarely skipped at first

    def forward(self, x: Tensor | Sequences) -> Tensor:
        """To the state (h of an LSTM) at each row's last step, (B, hidden); with `every_step`, to those of all steps.

        Args:
            x: (B, T, inputs), or `Sequences` of them. Behind a row's end its last state is repeated.

        Returns:
            (B, hidden) or (B, T, hidden).

        Raises:
            InputError: another shape, no step, or impossible lengths.
        """
        x_BTD, lengths = as_sequences(x, self.inputs)
        zero = x_BTD.new_zeros(x_BTD.shape[0], self.hidden)
        state: Any = (zero, zero) if isinstance(self.cell, nn.LSTMCell) else zero
        states = self._learning(x_BTD, lengths, state) if self.training else self._deciding(x_BTD, lengths, state)
        return torch.stack(states, 1) if self.every_step else states[-1]

    def _learning(self, x_BTD: Tensor, lengths: Tensor, state: Any) -> list[Tensor]:
        """h after every step, with the gradients of u."""
        states, batch = [], x_BTD.shape[0]
        u, du = x_BTD.new_ones(batch, 1), x_BTD.new_zeros(batch, 1)
        for t in range(x_BTD.shape[1]):
            hard = (u > 0.5).to(u.dtype)
            present = (t < lengths).to(u.dtype)[:, None]
            keep = self.tap(Decision(hard + (u - u.detach()), u), present=present).keep
            state, du = self.run(0, self._update, keep[:, 0], (x_BTD[:, t], state), otherwise=(state, du))
            u = keep * du + (1 - keep) * (u + torch.minimum(du, 1 - u))
            states.append(_hidden(state))
        return states

    def _deciding(self, x_BTD: Tensor, lengths: Tensor, state: Any) -> list[Tensor]:
        """The same in eval mode: after an update it is known when the next one is due, so steps can be jumped over.

        The score is minus the number of steps until then.
        """
        states: list[Tensor] = []
        steps, t = x_BTD.shape[1], 0
        due = torch.zeros_like(lengths)
        jumps = self.gathers and self.force is None and due.shape[0] > 0

        def update(given: tuple[Tensor, Any]) -> tuple[Any, Tensor]:
            new, du = self._update(given)
            # u is n * delta n steps after an update; the next one happens once that is above 1/2.
            return new, t + 1 + (0.5 / du[:, 0].float()).clamp(max=1e9).long()

        while t < steps:
            score = (t - due).to(x_BTD.dtype)[:, None]
            present = None if self.force is None else (t < lengths).to(score.dtype)[:, None]
            keep = self.tap(Decision((score >= 0).to(score.dtype), score), present=present).keep
            state, due = self.run(0, update, keep[:, 0], (x_BTD[:, t], state), otherwise=(state, due))
            due = due.where(due < lengths, steps)
            following = min(max(t + 1, int(due.min())), steps) if jumps else t + 1
            if self.trace is not None:  # it is to hear of every step
                for jumped in range(t + 1, following):
                    score = (jumped - due).to(score.dtype)[:, None]
                    self.tell(Decision(torch.zeros_like(score), score))
            states += [_hidden(state)] * (following - t)
            t = following
        return states

    def _update(self, given: tuple[Tensor, Any]) -> tuple[Any, Tensor]:
        state = self.cell(*given)
        return state, self.delta(_hidden(state)).sigmoid()


class UpdateCost(Objective):
    """State updates per sequence, averaged over the batch and summed over the UpdateSkip layers of a model.

    The paper's budget loss: weighted with its lambda (cost per update) it is a term of the loss,
    `CrossEntropy() + 1e-4 * UpdateCost()`. Unlike `train.Within` it presses on however few updates are left.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the decisions in the trace.

        Raises:
            StructureError: no UpdateSkip layer, or none that ran.
        """
        names = [name for layer, name in trace.names.items() if isinstance(layer, UpdateSkip)]
        keeps = [keep.flatten(1).sum(1).mean() for name in names for keep in trace[name]]
        if not keeps:
            raise StructureError(
                f"updates are counted for UpdateSkip layers that ran; the layers are {sorted(trace.names.values())}"
            )
        return torch.stack(keeps).sum()

    def __repr__(self) -> str:
        return "UpdateCost()"


def _hidden(state: Any) -> Tensor:
    """h of a state: the state itself, or the first of (h, c)."""
    return state[0] if isinstance(state, tuple) else state
