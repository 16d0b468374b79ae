"""Update skip: a recurrent cell runs at some time steps only; at the others its state is copied."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import check_sizes
from dynanet.core.objective import Objective
from dynanet.core.trace import Frame, Trace
from dynanet.data.ragged import Sequences, as_sequences
from dynanet.ops.native.library import fit
from dynanet.ops.native.recurrent import PackedCells, Ready, update_skip
from dynanet.ops.recurrent import next_step, zero_state


class UpdateSkip(Dynamic):
    """Skip RNN (Campos et al. 2018, arXiv:1708.06834, section 3).

    An update probability u starts at 1. While updates are skipped it grows by delta = sigmoid(W s + b) of the state s,
    up to 1; after an update it restarts at delta. An update happens when u passes 1/2, and the gradient of that
    rounding is taken to be 1. As delta depends on the state alone, a skipped step computes nothing.

    The layer decides once per time step, so `torch.stack(trace[name], 1)` is (B, T, 1). Rows whose sequence has ended
    keep 0, also under `forced`: padding costs nothing.

    In the sparse form rows run at their own pace: as an update determines when the next one is due, the first updates
    of all rows run together, then the second ones, each at the time step of its row. So batches stay full, and skipped
    steps are never visited. For an nn.LSTMCell or nn.GRUCell with frozen float32 weights on the CPU (as in a session)
    this is one native call, where native kernels were built.

    `UpdateCost` is the term of the loss that makes updates rare.

    Args:
        cell: maps (x_t, state) to the next state: nn.GRUCell, nn.RNNCell, or nn.LSTMCell, whose state is (h, c).
        inputs: features per time step.
        hidden: size of the state; of h and c each.
        every_step: answer the states of all steps instead of the last one, for stacked recurrent layers.

    Raises:
        ConfigError: sizes below 1.
    """

    def __init__(self, cell: nn.Module, inputs: int, hidden: int, *, every_step: bool = False) -> None:
        super().__init__()
        check_sizes(inputs=inputs, hidden=hidden)
        self.update = Update(cell, nn.Linear(hidden, 1))  # one module, so that a session makes one engine of it
        self.inputs, self.hidden = inputs, hidden
        self.every_step = every_step
        self._pair = isinstance(cell, nn.LSTMCell)  # kept, as a session replaces the cell by an engine
        self._packed = PackedCells()
        nn.init.constant_(self.delta.bias, 1.0)  # the paper's start: updates are rarely skipped at first

    @property
    def cell(self) -> nn.Module:
        """The recurrent cell."""
        return self.update.cell

    @property
    def delta(self) -> nn.Linear:
        """Maps the state to the log-odds of delta."""
        return self.update.delta

    @property
    def runs_whole(self) -> bool:
        """Whether all steps are one native call, so that engines for parts would gain nothing."""
        return self._native() is not None

    def forward(self, x: Tensor | Sequences) -> Tensor:
        """The state (h of an LSTM) after the last step of each row; with `every_step`, after every step.

        Args:
            x: (B, T, inputs), or `Sequences` of them.

        Returns:
            (B, hidden), or (B, T, hidden), where the last state of a row is repeated after its end.

        Raises:
            InputError: another shape, no step, or impossible lengths.
        """
        x_BTD, lengths = as_sequences(x, self.inputs)
        zeros = zero_state(x_BTD, x_BTD.shape[0], self.hidden, pair=self._pair)
        state = zeros if self._pair else (zeros,)
        # Decisions inside the cell, and forced ones, have to be traced step by step.
        if self.gathers and self.force is None and not any(isinstance(m, Dynamic) for m in self.update.modules()):
            ready = self._native() if fit(x_BTD) else None
            if ready is None:
                return self._jumping(x_BTD, lengths, state)
            return self._natively(x_BTD, lengths, ready)
        states = self._learning(x_BTD, lengths, state) if self.training else self._deciding(x_BTD, lengths, state)
        return torch.stack(states, 1) if self.every_step else states[-1]

    def _learning(self, x_BTD: Tensor, lengths: Tensor, state: tuple[Tensor, ...]) -> list[Tensor]:
        """The h after every step, with the gradients of u."""
        states = []
        u = x_BTD.new_ones(x_BTD.shape[0], 1)
        du = torch.zeros_like(u)
        for t in range(x_BTD.shape[1]):
            hard = (u > 0.5).to(u.dtype)
            present = (t < lengths).to(u.dtype)[:, None]
            keep = self.tap(Decision(hard + (u - u.detach()), u), present=present).keep
            given, otherwise = (x_BTD[:, t], *state), (*state, du)
            *new, du = self.run(0, lambda given: self.update.learning(*given), keep[:, 0], given, otherwise)
            state = tuple(new)
            u = keep * du + (1 - keep) * (u + torch.minimum(du, 1 - u))
            states.append(state[0])
        return states

    def _deciding(self, x_BTD: Tensor, lengths: Tensor, state: tuple[Tensor, ...]) -> list[Tensor]:
        """The h after every step, in eval mode. The score is minus the number of steps until the next update."""
        states: list[Tensor] = []
        steps = x_BTD.shape[1]
        due = torch.zeros_like(lengths)
        for t in range(steps):
            score = (t - due).to(x_BTD.dtype)[:, None]
            present = None if self.force is None else (t < lengths).to(score.dtype)[:, None]
            keep = self.tap(Decision((score >= 0).to(score.dtype), score), present=present).keep
            given, otherwise = (x_BTD[:, t], *state), (*state, due - t)
            *new, wait = self.run(0, lambda given: self.update(*given), keep[:, 0], given, otherwise)
            state = tuple(new)
            due = (t + wait).where(t + wait < lengths, steps)
            states.append(state[0])
        return states

    def _jumping(self, x_BTD: Tensor, lengths: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """The answer, computed update by update instead of step by step."""
        batch, steps = x_BTD.shape[:2]
        frames = x_BTD.flatten(0, 1)
        first = torch.arange(batch, device=x_BTD.device) * steps
        # Of every row that goes on: its place in `frames`, its end there, and its number. One tensor, as the time of
        # this loop is the number of operators.
        going = torch.stack([first, first + lengths, first // steps])
        updated = [going[0, :0]]
        states = [state[0][:0]]
        ended = [(going[2, :0], state[0][:0])]
        while going.shape[1]:
            at, end, rows = going.unbind()
            with self.within(Frame(self, range(1), (batch,), rows, None, flat=True)):
                *new, wait = self.update(frames.index_select(0, at), *state)
            state = tuple(new)
            if self.every_step or self.trace is not None:
                updated.append(at.clone())
            if self.every_step:
                states.append(state[0])
            should_continue = at.add_(wait) < end
            if should_continue.all():
                continue
            over = (~should_continue).nonzero().squeeze(1)
            on = should_continue.nonzero().squeeze(1)
            ended.append((rows.index_select(0, over), state[0].index_select(0, over)))
            going = going.index_select(1, on)
            state = tuple(t.index_select(0, on) for t in state)
        if self.trace is not None:
            mask = torch.zeros(batch * steps, dtype=torch.bool, device=x_BTD.device)
            self._log_all(mask.index_fill(0, torch.cat(updated), True).view(batch, steps), x_BTD.dtype)
        if not self.every_step:
            places, last = (torch.cat(parts) for parts in zip(*ended, strict=True))
            return last.new_empty(batch, self.hidden).index_copy_(0, places, last)
        # Between updates the state is that of the newest one: the cumulative maximum of their numbers.
        places = torch.cat(updated)
        newest = torch.zeros_like(frames[:, 0], dtype=torch.long)
        newest[places] = torch.arange(places.shape[0], device=places.device)
        return torch.cat(states)[newest.view(batch, steps).cummax(1).values]

    def _native(self) -> Ready | None:
        """The weights for the native kernel, if it can run this layer."""
        update = self.update
        cell = getattr(update, "cell", None)
        sizes = (getattr(cell, "input_size", None), getattr(cell, "hidden_size", None))
        if type(update) is not Update or cell is None or sizes != (self.inputs, self.hidden):
            return None
        return self._packed.of([cell], update.delta, around=[update])

    def _natively(self, x_BTD: Tensor, lengths: Tensor, ready: Ready) -> Tensor:
        """`_jumping` in one call."""
        with self.within(Frame(self, range(1), (x_BTD.shape[0],), None, None, flat=True)):
            answer, updated = update_skip(x_BTD, lengths, ready, every_step=self.every_step)
        if self.trace is not None:
            self._log_all(updated.bool(), x_BTD.dtype)
        return answer

    def _log_all(self, updated: Tensor, dtype: torch.dtype) -> None:
        """Record the decision of every step, as `_deciding` does, from the mask (B, T) of updates."""
        due = next_step(updated)
        for t in range(updated.shape[1]):
            self.log(Decision(updated[:, t : t + 1].to(dtype), (t - due[:, t : t + 1]).to(dtype)))


class Update(nn.Module):
    """Updates the state (h or h, c), and says how many steps later the next update is due."""

    def __init__(self, cell: nn.Module, delta: nn.Linear) -> None:
        super().__init__()
        self.cell, self.delta = cell, delta

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Map x (rows, inputs) and a state to (*state, steps (rows,))."""
        *new, delta = self.learning(x, *state)
        # u is n * delta n steps after an update; the next one happens once that is above 1/2. A NaN updates always.
        return *new, 1 + (0.5 / delta[:, 0].float()).clamp(max=1e9).long().clamp(min=0)

    def learning(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Map x (rows, inputs) and a state to (*state, delta (rows, 1)), with gradients."""
        new = self.cell(x, state if len(state) > 1 else state[0])
        state = new if isinstance(new, tuple) else (new,)
        return *state, self.delta(state[0]).sigmoid()


@dataclass(frozen=True)
class UpdateCost(Objective):
    """State updates per sequence, averaged over the batch and summed over the UpdateSkip layers of a model.

    The paper's budget loss, weighted with its lambda (cost per update): `CrossEntropy() + 1e-4 * UpdateCost()`. Unlike
    `train.BudgetPenalty` its gradient does not vanish below a budget.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The cost of the decisions in the trace.

        Raises:
            StructureError: no UpdateSkip layer that ran.
        """
        return torch.stack([call.keep.flatten(1).sum(1).mean() for call in trace.decisions(UpdateSkip)]).sum()
