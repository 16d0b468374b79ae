"""Jump: after every few steps a recurrent network jumps ahead, or stops. What lies between is never read."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.data.ragged import Sequences, as_sequences
from dynanet.gates.rules import OneOf


class Jump(Dynamic):
    """LSTM-Jump (Yu et al. 2017, arXiv:1704.06877, section 2).

    A row reads `read` steps (the paper's R), then jumps: by 1 to the next step, by k over k - 1 steps, by 0 to its end.
    The jump is drawn from a softmax of the hidden state in training, and is the likeliest one in eval mode. A row ends
    with a jump of 0, behind its last step, or with the steps it reads after its last jump.

    Unit 0 is the cell, unit 1 the choice of a jump. The trace hears of every time step, so `torch.stack(trace[name],
    1)` is (B, T, 2): which steps a row read, and after which of them it chose; the score is minus the number of steps
    until the next one that is read. Rows jump apart, and a pass takes as many calls of the cell as the longest reader
    reads steps, wherever these lie. `forced` says which steps are read; jumps then start from these.

    In training a baseline guesses from the hidden state how well a row will do: for `ReinforceJumps`, the term of the
    loss that jumps learn from.

    Args:
        cell: maps (x_t, state) to the next state: nn.LSTMCell, whose state is (h, c), nn.GRUCell, or any module like
            these.
        inputs: features per time step.
        hidden: size of the state; of h and c each.
        read: steps read before every jump.
        reach: the longest jump, the paper's K.
        jumps: how often a row jumps at most, the paper's N.
        scorer: from the state (h of an LSTM) to the logits of the jumps (rows, reach + 1); None for one linear map.

    Attributes:
        read: may be changed at any time, as in the paper: to read more between jumps than in training, say.
        jumps: likewise.

    Raises:
        ConfigError: sizes that are no whole numbers of at least 1.
    """

    def __init__(
        self,
        cell: nn.Module,
        inputs: int,
        hidden: int,
        *,
        read: int,
        reach: int,
        jumps: int,
        scorer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not _sizes(inputs, hidden, read, reach, jumps):
            raise ConfigError(
                f"jumps from {inputs} inputs and {hidden} hidden features, {read} steps read before each of at most "
                f"{jumps} jumps of up to {reach}; all must be whole numbers of at least 1"
            )
        self.cell, self.inputs, self.hidden = cell, inputs, hidden
        self.read, self.reach, self.jumps = read, reach, jumps
        self.gate = Gate(scorer if scorer is not None else nn.Linear(hidden, reach + 1), OneOf(), units=reach + 1)
        self.baseline = nn.Linear(hidden, 1)
        self._pair = isinstance(cell, nn.LSTMCell)  # asked now, as a session puts an engine in the cell's place

    @property
    def decides(self) -> str:
        """How much it reads, and how often it jumps."""
        return f"a jump after every {self.read} steps read, at most {self.jumps} times"

    def forward(self, x: Tensor | Sequences) -> Tensor:
        """To the state (h of an LSTM) after the last step that a row reads, (B, hidden).

        Args:
            x: (B, T, inputs), or `Sequences` of them.

        Raises:
            InputError: another shape, no step, or impossible lengths.
            StructureError: `read` or `jumps` was set to less than 1, or a scorer of another number of jumps.
        """
        if not _sizes(self.read, self.jumps):
            raise StructureError(
                f"read is {self.read} and jumps is {self.jumps}; set both to whole numbers of at least 1, as they were "
                f"when this layer was made"
            )
        x_BTD, lengths = as_sequences(x, self.inputs)
        zero, none = x_BTD.new_zeros(x_BTD.shape[0], self.hidden), torch.zeros_like(lengths, dtype=torch.int64)
        reader = _Reader((zero, zero) if self._pair else zero, none, none, none)
        along = self._jumping if self.force is None else self._stepping
        return _hidden(along(x_BTD, lengths.long(), reader).state)

    def _jumping(self, x_BTD: Tensor, lengths: Tensor, reader: "_Reader") -> "_Reader":
        """Read after read, each row at a position of its own."""
        visits: list[tuple[Tensor, Tensor, Tensor]] = []
        steps = x_BTD.shape[1]
        for _ in range(min(self.read * (self.jumps + 1), steps)):
            reads = reader.due < lengths
            if _nobody(reads):
                break
            at = reader.due.where(reads, 0)  # who has ended looks at what it has read, and drops it
            step = x_BTD.gather(1, at[:, None, None].expand(-1, 1, self.inputs))[:, 0]
            reader, chooses = self._visit(step, at, reads, lengths, reader, steps)
            visits.append((at, reads, chooses))
        if self.trace is not None:
            self._tell_steps(x_BTD, visits)
        return reader

    def _tell_steps(self, x_BTD: Tensor, visits: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Visits, each of a row at its own position, as decisions step by step."""
        batch, steps = x_BTD.shape[:2]
        time = torch.arange(steps, device=x_BTD.device)
        kept = x_BTD.new_zeros(batch, steps, 2)
        for at, reads, chooses in visits:  # a row reads a step once
            kept.scatter_add_(1, at[:, None, None].expand(-1, 1, 2), _columns(reads, chooses, x_BTD)[:, None])
        due = time.where(kept[..., 0] > 0, steps).flip(1).cummin(1).values.flip(1)
        for keep, score in zip(kept.unbind(1), (time - due).to(x_BTD.dtype).split(1, 1), strict=True):
            self.log(Decision(keep, score))

    def _stepping(self, x_BTD: Tensor, lengths: Tensor, reader: "_Reader") -> "_Reader":
        """Step after step, all rows at the same: who reads is said from outside."""
        steps = x_BTD.shape[1]
        for t in range(steps):
            at = torch.full_like(lengths, t)
            due, there = reader.due <= t, _columns(at < lengths, at < lengths, x_BTD)
            score = (t - reader.due).to(x_BTD.dtype)[:, None]
            own = Decision(_columns(due, due & self._will_choose(at, lengths, reader), x_BTD), score)
            reads = self.apply_override(own, present=there).keep[:, 0] > 0
            reader, chooses = self._visit(x_BTD[:, t], at, reads, lengths, reader, steps)
            self.log(Decision(_columns(reads, chooses, x_BTD), score))
        return reader

    def _visit(
        self, step: Tensor, at: Tensor, reads: Tensor, lengths: Tensor, reader: "_Reader", steps: int
    ) -> tuple["_Reader", Tensor]:
        """Rows with `reads` (B,) read what lies at their step `at` (B,); and who of them chose a jump, (B,)."""
        given = step, reader.state
        state = self.run(0, lambda g: self.cell(*g), reads.to(step.dtype), given, otherwise=reader.state)
        read = reader.read + reads
        full = reads & (read >= self.read)
        chooses = reads & self._will_choose(at, lengths, reader)
        size = self._choose(_hidden(state), chooses)
        due = (at + 1).where(reads, reader.due)
        due = (at + size).where(size > 0, steps).where(full, due)  # who is full and may not choose has a size of 0
        return _Reader(state, due.where(due < lengths, steps), read * ~full, reader.jumps + chooses), chooses

    def _will_choose(self, at: Tensor, lengths: Tensor, reader: "_Reader") -> Tensor:
        """Would a row that reads at `at` choose a jump then? (B,)."""
        return (reader.read + 1 >= self.read) & (reader.jumps < self.jumps) & (at + 1 < lengths)

    def _choose(self, hidden: Tensor, chooses: Tensor) -> Tensor:
        """How far rows jump, (B,); 0 where they do not choose."""

        def choose(hidden: Tensor) -> Tensor:
            jump = self.gate(hidden)
            if self.training and self.trace is not None:
                # The baseline is to follow the states, not to shape them.
                value = self.baseline(hidden.detach())[:, 0]
                self.trace.log_answer(self, Jumps(jump.keep, jump.score, value, chooses))
            return jump.keep.argmax(1)

        nowhere = torch.zeros_like(chooses, dtype=torch.int64)
        if _nobody(chooses):
            return nowhere
        return self.run(1, choose, chooses.to(hidden.dtype), hidden, otherwise=nowhere)


class Jumps(NamedTuple):
    """What a Jump drew in training, for its loss: an answer in the trace for every time it chose.

    Attributes:
        keep: (B, reach + 1), 1 at the jump that was drawn.
        score: (B, reach + 1) logits.
        value: (B,) the baseline's guess of the reward.
        chooses: (B,) bool. The others drew too, and nothing came of it.
    """

    keep: Tensor
    score: Tensor
    value: Tensor
    chooses: Tensor


class ReinforceJumps(Objective):
    """Trains the jumps of all Jump layers (section 2.2): `CrossEntropy() + ReinforceJumps()`.

    REINFORCE (Williams 1992, doi:10.1007/BF00992696) with a reward of 1 for a right answer and -1 for a wrong one, less
    the baseline; and the baseline's squared error, which is how it learns. Where nothing is drawn because the model is
    in eval mode (validation), it is 0.

    Args:
        reading: what reading a step costs, in rewards. 0 as in the paper: `read`, `reach` and `jumps` are the bounds.
        entropy: weight of the mean entropy (nats) of the jumps' distributions, which keeps them from settling early.

    Raises:
        ConfigError: a weight below 0.
    """

    def __init__(self, reading: float = 0.0, *, entropy: float = 0.0) -> None:
        if not (reading >= 0 and entropy >= 0):
            raise ConfigError(
                f"jumps are reinforced with a price of {reading} for reading and a weight of {entropy} for entropy; "
                f"give 0 or more"
            )
        self.reading, self.entropy = reading, entropy

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Over the jumps in the trace; `answer` is (B, classes).

        Raises:
            StructureError: no Jump layer that ran, or one that saw other rows than the batch.
        """
        layers = {name: layer for layer, name in trace.names.items() if isinstance(layer, Jump)}
        keeps = [keep for name in layers for keep in trace[name]]
        if not keeps:
            raise StructureError(
                f"jumps are reinforced for Jump layers that ran; the layers are {sorted(trace.names.values())}"
            )
        drawn: list[Jumps] = [jump for name in layers for jump in trace.answers.get(name, [])]
        if not drawn:  # in eval mode, or sequences too short to jump in
            return answer.new_zeros(())
        rows = {jump.chooses.shape[0] for jump in drawn}
        if rows != {y.shape[0]}:
            raise StructureError(
                f"jumps of {sorted(rows)} rows in a batch of {y.shape[0]}; this loss needs every row of the batch once"
            )
        score, value = torch.stack([j.score for j in drawn], 1), torch.stack([j.value for j in drawn], 1)
        chooses = torch.stack([j.chooses for j in drawn], 1).to(score.dtype)  # (B, choices)
        log_p = OneOf.log_prob(score, torch.stack([j.keep for j in drawn], 1))
        reward = (answer.detach().argmax(1) == y).to(score.dtype) * 2 - 1
        if self.reading:
            reward = reward - self.reading * torch.stack([keep.detach()[..., 0] for keep in keeps]).sum(0)
        missed = reward[:, None] - value
        loss = ((missed.square() - log_p * missed.detach()) * chooses).sum(1).mean()
        if self.entropy:
            entropy = -(score.softmax(-1) * score.log_softmax(-1)).sum(-1)
            loss = loss - self.entropy * (entropy * chooses).sum() / chooses.sum().clamp(min=1)
        return loss

    def __repr__(self) -> str:
        return f"ReinforceJumps({self.reading:g}, entropy={self.entropy:g})"


class _Reader(NamedTuple):
    """Where the rows are: their state, the step they read next (as many as there are steps: none), the steps they have
    read since the last jump, and the jumps they have made.
    """

    state: Any
    due: Tensor
    read: Tensor
    jumps: Tensor


def _sizes(*numbers: int) -> bool:
    """Are these whole numbers of at least 1?"""
    return all(isinstance(number, int) and number >= 1 for number in numbers)


def _columns(reads: Tensor, chooses: Tensor, like: Tensor) -> Tensor:
    """keep (B, 2) of unit 0 and unit 1."""
    return torch.stack([reads, chooses], 1).to(like.dtype)


def _nobody(rows: Tensor) -> bool:
    """No row, where that may be asked: a compiled or exported graph holds every step."""
    return not torch.compiler.is_compiling() and not bool(rows.any())


def _hidden(state: Any) -> Tensor:
    """h of a state: the state itself, or the first of (h, c)."""
    return state[0] if isinstance(state, tuple) else state
