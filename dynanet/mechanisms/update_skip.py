"""Update skip: a recurrent cell runs only at the time steps that call for it; at the others its state is copied."""

from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.objective import Objective
from dynanet.core.trace import Frame, Trace
from dynanet.data.ragged import Sequences, as_sequences
from dynanet.ops.native.library import fit
from dynanet.ops.native.recurrent import PackedCells, Ready, update_skip


class UpdateSkip(Dynamic):
    """Skip RNN (Campos et al. 2018, arXiv:1708.06834, section 3).

    An update probability u starts at 1. While updates are skipped it grows by delta = sigmoid(W s + b) of the state s,
    cut off at 1; after an update it starts anew at delta. An update happens when u passes 1/2, and the gradient of that
    rounding is taken to be 1. As delta depends on the state alone, a skipped step computes nothing.

    The layer decides once per time step, so `torch.stack(trace[name], 1)` is (B, T, 1). Rows whose sequence has ended
    decide 0, whatever is forced: padding costs nothing.

    In the sparse form rows do not wait for each other: as an update tells when the next one is due, the first updates
    of all rows run together, then the second ones, each row's at its own time. Batches stay full, and steps that are
    skipped are not even looked at. For an nn.LSTMCell or nn.GRUCell with frozen float32 weights on the CPU (those of a
    session, say) all of this is one native call, where native kernels were built.

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

    def __init__(self, cell: nn.Module, inputs: int, hidden: int, *, every_step: bool = False) -> None:
        super().__init__()
        if min(inputs, hidden) < 1:
            raise ConfigError(f"update skip from {inputs} inputs to {hidden} hidden features; both must be at least 1")
        self.update = Update(cell, nn.Linear(hidden, 1))  # a part of its own, so that a session makes one engine of it
        self.inputs, self.hidden, self.every_step = inputs, hidden, every_step
        self._pair = isinstance(cell, nn.LSTMCell)  # asked now: a session puts an engine in the cell's place
        self._packed = PackedCells()
        self.register_state_dict_post_hook(_without_update)
        self.register_load_state_dict_pre_hook(_with_update)
        nn.init.constant_(self.delta.bias, 1.0)  # the paper's start: updates are rarely skipped at first

    @property
    def cell(self) -> nn.Module:
        """What reads."""
        return self.update.cell

    @property
    def delta(self) -> nn.Linear:
        """From the state to the log-odds of delta."""
        return self.update.delta

    @property
    def runs_whole(self) -> bool:
        """All steps are one native call: a session has nothing to gain from engines for parts."""
        return self._native() is not None

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
        state = (zero, zero) if self._pair else (zero,)
        # What decides inside the cell is to be heard step by step, and so is what is forced.
        if self.gathers and self.force is None and not any(isinstance(m, Dynamic) for m in self.update.modules()):
            ready = self._native() if fit(x_BTD) else None
            if ready is None:
                return self._jumping(x_BTD, lengths, state)
            return self._natively(x_BTD, lengths, ready)
        states = self._learning(x_BTD, lengths, state) if self.training else self._deciding(x_BTD, lengths, state)
        return torch.stack(states, 1) if self.every_step else states[-1]

    def _learning(self, x_BTD: Tensor, lengths: Tensor, state: tuple[Tensor, ...]) -> list[Tensor]:
        """h after every step, with the gradients of u."""
        states, batch = [], x_BTD.shape[0]
        u, du = x_BTD.new_ones(batch, 1), x_BTD.new_zeros(batch, 1)
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
        """The same in eval mode, by when the next update is due. The score is minus the number of steps until then."""
        states: list[Tensor] = []
        steps, due = x_BTD.shape[1], torch.zeros_like(lengths)
        for t in range(steps):
            score = (t - due).to(x_BTD.dtype)[:, None]
            present = None if self.force is None else (t < lengths).to(score.dtype)[:, None]
            keep = self.tap(Decision((score >= 0).to(score.dtype), score), present=present).keep
            given, otherwise = (x_BTD[:, t], *state), (*state, due - t)
            *new, wait = self.run(0, lambda given: self.update(*given), keep[:, 0], given, otherwise)
            state, due = tuple(new), (t + wait).where(t + wait < lengths, steps)
            states.append(state[0])
        return states

    def _jumping(self, x_BTD: Tensor, lengths: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """The same answer, update by update instead of step by step."""
        (batch, steps), frames = x_BTD.shape[:2], x_BTD.flatten(0, 1)
        first = torch.arange(batch, device=x_BTD.device) * steps
        going = torch.stack([first, first + lengths, first // steps])  # as one tensor: every operator takes its time
        updated, states, ended = [going[0, :0]], [state[0][:0]], [(going[2, :0], state[0][:0])]
        while going.shape[1]:
            at, end, rows = going.unbind()  # where in `frames` a row is, where it is over, and which row
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
            over, on = (~should_continue).nonzero().squeeze(1), should_continue.nonzero().squeeze(1)
            ended.append((rows.index_select(0, over), state[0].index_select(0, over)))
            going, state = going.index_select(1, on), tuple(t.index_select(0, on) for t in state)
        if self.trace is not None:
            self._tell_all(torch.cat(updated), batch, steps, x_BTD.dtype)
        if not self.every_step:
            places, last = (torch.cat(parts) for parts in zip(*ended, strict=True))
            return last.new_empty(batch, self.hidden).index_copy_(0, places, last)
        places = torch.cat(updated)
        newest = torch.zeros_like(frames[:, 0], dtype=torch.long)
        newest[places] = torch.arange(places.shape[0], device=places.device)
        return torch.cat(states)[newest.view(batch, steps).cummax(1).values]

    def _native(self) -> Ready | None:
        """What the native kernel takes, if it can run this layer."""
        update, cell = self.update, getattr(self.update, "cell", None)
        sizes = (getattr(cell, "input_size", None), getattr(cell, "hidden_size", None))
        if type(update) is not Update or cell is None or sizes != (self.inputs, self.hidden):
            return None
        return self._packed.of([cell], update.delta, around=[update])

    def _natively(self, x_BTD: Tensor, lengths: Tensor, ready: Ready) -> Tensor:
        """As `_jumping`, in one call."""
        with self.within(Frame(self, range(1), (x_BTD.shape[0],), None, None, flat=True)):
            answer, updated = update_skip(x_BTD, lengths, ready, every_step=self.every_step)
        if self.trace is not None:
            self._tell_all(updated.flatten().nonzero().squeeze(1), *updated.shape, x_BTD.dtype)
        return answer

    def _tell_all(self, updated: Tensor, batch: int, steps: int, dtype: torch.dtype) -> None:
        """The trace hears of every step what `_deciding` would have told it."""
        due = torch.full((batch * steps,), steps, device=updated.device)
        due[updated] = updated % steps
        due = due.view(batch, steps).flip(1).cummin(1).values.flip(1)
        for t in range(steps):
            self.log(Decision((due[:, t : t + 1] == t).to(dtype), (t - due[:, t : t + 1]).to(dtype)))


class Update(nn.Module):
    """An update of the state (h or h, c), and how many steps later the next one is due: one part of a session."""

    def __init__(self, cell: nn.Module, delta: nn.Linear) -> None:
        super().__init__()
        self.cell, self.delta = cell, delta

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """(*state, steps (rows,))."""
        *state_, delta = self.learning(x, *state)
        # u is n * delta n steps after an update; the next one happens once that is above 1/2. A NaN updates always.
        return *state_, 1 + (0.5 / delta[:, 0].float()).clamp(max=1e9).long().clamp(min=0)

    def learning(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """(*state, delta (rows, 1)), with gradients."""
        new = self.cell(x, state if len(state) > 1 else state[0])
        state = new if isinstance(new, tuple) else (new,)
        return *state, self.delta(state[0]).sigmoid()


class UpdateCost(Objective):
    """State updates per sequence, averaged over the batch and summed over the UpdateSkip layers of a model.

    The paper's budget loss: weighted with its lambda (cost per update) it is a term of the loss,
    `CrossEntropy() + 1e-4 * UpdateCost()`. Unlike `train.BudgetPenalty` it presses on however few updates are left.
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


def _without_update(layer: nn.Module, weights: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Saved weights have the names `cell` and `delta`, whatever a session needs for a part."""
    for name in [name for name in weights if name.startswith(f"{prefix}update.")]:
        weights[prefix + name.removeprefix(f"{prefix}update.")] = weights.pop(name)


def _with_update(layer: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in weights if name.startswith((f"{prefix}cell.", f"{prefix}delta."))]:
        weights[f"{prefix}update.{name.removeprefix(prefix)}"] = weights.pop(name)
