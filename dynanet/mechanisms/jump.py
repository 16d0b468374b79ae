"""Jump: after every few steps a recurrent network jumps ahead or stops. Steps in between are never read."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError, check_sizes
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.data.ragged import Sequences, as_sequences
from dynanet.gates.rules import OneOf
from dynanet.ops.recurrent import hidden_of, next_step, zero_state


class Jump(Dynamic):
    """LSTM-Jump (Yu et al. 2017, arXiv:1704.06877, section 2).

    A row reads `read` steps (the paper's R), then jumps: by 1 to the next step, by k over k - 1 steps, by 0 to its end.
    The jump is drawn from a softmax of the hidden state in training, and is the most probable one in eval mode. A row
    ends after a jump of 0, after its last step, or after the steps that follow its last jump.

    Unit 0 is the cell, unit 1 the choice of a jump. The trace holds every time step, so `torch.stack(trace[name], 1)`
    is (B, T, 2): the steps that a row read, and those after which it chose a jump; the score is minus the number of
    steps until the next one that is read. Each row is at a position of its own, and a pass takes as many calls of the
    cell as the largest number of steps that a row reads. `forced` sets which steps are read; jumps start from these.

    In training a baseline predicts the reward of a row from its hidden state, for `ReinforceJumps`, the term of the
    loss that trains jumps.

    Args:
        cell: maps (x_t, state) to the next state: nn.LSTMCell, whose state is (h, c), nn.GRUCell or nn.RNNCell.
        inputs: features per time step.
        hidden: size of the state; of h and c each.
        read: steps read before every jump.
        reach: the longest jump, the paper's K.
        jumps: maximum number of jumps of a row, the paper's N.
        scorer: maps the state (h of an LSTM) to the logits of the jumps (rows, reach + 1); None for a linear map.

    Attributes:
        read: may be changed at any time, as in the paper, for example to read more between jumps than in training.
        jumps: likewise.

    Raises:
        ConfigError: a size that is not a whole number of at least 1.
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
        check_sizes(inputs=inputs, hidden=hidden, read=read, reach=reach, jumps=jumps)
        self.cell = cell
        self.inputs, self.hidden = inputs, hidden
        self.read, self.reach = read, reach
        self.jumps = jumps
        self.gate = Gate(scorer if scorer is not None else nn.Linear(hidden, reach + 1), OneOf(), units=reach + 1)
        self.baseline = nn.Linear(hidden, 1)
        self._pair = isinstance(cell, nn.LSTMCell)  # kept, as a session replaces the cell by an engine

    @property
    def decides(self) -> str:
        """The bounds of reading, in words."""
        return f"a jump after every {self.read} steps read, at most {self.jumps} times"

    def forward(self, x: Tensor | Sequences) -> Tensor:
        """The state (h of an LSTM) after the last step that a row reads, (B, hidden).

        Args:
            x: (B, T, inputs), or `Sequences` of them.

        Raises:
            InputError: another shape, no step, or impossible lengths.
            ConfigError: `read` or `jumps` was set to less than 1.
            StructureError: a scorer of another number of jumps.
        """
        check_sizes(read=self.read, jumps=self.jumps)  # both may be set at any time
        x_BTD, lengths = as_sequences(x, self.inputs)
        zero = torch.zeros_like(lengths, dtype=torch.int64)
        state = zero_state(x_BTD, x_BTD.shape[0], self.hidden, pair=self._pair)
        reader = _Reader(state, zero, zero, zero)
        along = self._jumping if self.force is None else self._stepping
        return hidden_of(along(x_BTD, lengths.long(), reader).state)

    def _jumping(self, x_BTD: Tensor, lengths: Tensor, reader: "_Reader") -> "_Reader":
        """Read until no row has a step left, each row at its own position."""
        visits: list[tuple[Tensor, Tensor, Tensor]] = []
        steps = x_BTD.shape[1]
        for _ in range(min(self.read * (self.jumps + 1), steps)):
            reads = reader.due < lengths
            if _none(reads):
                break
            at = reader.due.where(reads, 0)  # rows that have ended take any step, which `run` leaves out
            step = x_BTD.gather(1, at[:, None, None].expand(-1, 1, self.inputs))[:, 0]
            reader, chooses = self._visit(step, at, reads, lengths, reader, steps)
            visits.append((at, reads, chooses))
        if self.trace is not None:
            self._log_steps(x_BTD, visits)
        return reader

    def _log_steps(self, x_BTD: Tensor, visits: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Record visits (positions, reads, chooses), with each row at its own position, as decisions per time step."""
        batch, steps = x_BTD.shape[:2]
        kept = x_BTD.new_zeros(batch, steps, 2)
        for at, reads, chooses in visits:  # a row reads no step twice, so that sums are 0 or 1
            kept.scatter_add_(1, at[:, None, None].expand(-1, 1, 2), _columns(reads, chooses, x_BTD)[:, None])
        wait = next_step(kept[..., 0] > 0) - torch.arange(steps, device=x_BTD.device)
        for keep, score in zip(kept.unbind(1), (-wait).to(x_BTD.dtype).split(1, 1), strict=True):
            self.log(Decision(keep, score))

    def _stepping(self, x_BTD: Tensor, lengths: Tensor, reader: "_Reader") -> "_Reader":
        """Visit step after step with all rows, where `forced` sets which of them read."""
        steps = x_BTD.shape[1]
        for t in range(steps):
            at = torch.full_like(lengths, t)
            due = reader.due <= t
            present = _columns(at < lengths, at < lengths, x_BTD)
            score = (t - reader.due).to(x_BTD.dtype)[:, None]
            own = Decision(_columns(due, due & self._will_choose(at, lengths, reader), x_BTD), score)
            reads = self.apply_override(own, present=present).keep[:, 0] > 0
            reader, chooses = self._visit(x_BTD[:, t], at, reads, lengths, reader, steps)
            self.log(Decision(_columns(reads, chooses, x_BTD), score))
        return reader

    def _visit(
        self, step: Tensor, at: Tensor, reads: Tensor, lengths: Tensor, reader: "_Reader", steps: int
    ) -> tuple["_Reader", Tensor]:
        """Rows with `reads` (B,) read `step` (B, inputs) at their positions `at` (B,), and jump where a jump is due.

        Returns:
            The progress after it, and the rows that chose a jump, (B,) bool.
        """
        given = step, reader.state
        state = self.run(0, lambda g: self.cell(*g), reads.to(step.dtype), given, otherwise=reader.state)
        read = reader.read + reads
        full = reads & (read >= self.read)
        chooses = reads & self._will_choose(at, lengths, reader)
        size = self._choose(hidden_of(state), chooses)
        due = (at + 1).where(reads, reader.due)
        due = (at + size).where(size > 0, steps).where(full, due)  # rows that are full but may not jump have size 0
        return _Reader(state, due.where(due < lengths, steps), read * ~full, reader.jumps + chooses), chooses

    def _will_choose(self, at: Tensor, lengths: Tensor, reader: "_Reader") -> Tensor:
        """Whether a row that reads at `at` chooses a jump after it, (B,) bool."""
        return (reader.read + 1 >= self.read) & (reader.jumps < self.jumps) & (at + 1 < lengths)

    def _choose(self, hidden: Tensor, chooses: Tensor) -> Tensor:
        """How far rows jump, (B,) int64; 0 where they do not choose."""

        def choose(hidden: Tensor) -> Tensor:
            jump = self.gate(hidden)
            if self.training and self.trace is not None:
                # The baseline must predict from the states, not change them.
                value = self.baseline(hidden.detach())[:, 0]
                self.trace.log_answer(self, Jumps(jump.keep, jump.score, value, chooses))
            return jump.keep.argmax(1)

        nowhere = torch.zeros_like(chooses, dtype=torch.int64)
        if _none(chooses):
            return nowhere
        return self.run(1, choose, chooses.to(hidden.dtype), hidden, otherwise=nowhere)


class Jumps(NamedTuple):
    """What a Jump drew in training, for its loss; `trace.answers[name]` holds one for every choice.

    Attributes:
        keep: (B, reach + 1), 1 at the jump that was drawn.
        score: (B, reach + 1) logits.
        value: (B,) the baseline's prediction of the reward.
        chooses: (B,) bool, the rows whose draw was used.
    """

    keep: Tensor
    score: Tensor
    value: Tensor
    chooses: Tensor


@dataclass(frozen=True)
class ReinforceJumps(Objective):
    """Trains the jumps of all Jump layers (section 2.2 of the paper): `CrossEntropy() + ReinforceJumps()`.

    REINFORCE (Williams 1992, doi:10.1007/BF00992696) with a reward of 1 for a right answer and -1 for a wrong one,
    minus the baseline, plus the squared error of the baseline, by which it learns. In eval mode (validation), where
    nothing is drawn, the loss is 0.

    Args:
        reading: cost of a step that is read, in rewards. 0 in the paper, where `read`, `reach` and `jumps` are bounds.
        entropy: weight of the mean entropy (nats) of the distributions of jumps, which keeps them from settling early.

    Raises:
        ConfigError: a negative weight.
    """

    reading: float = 0.0
    _: KW_ONLY
    entropy: float = 0.0

    def __post_init__(self) -> None:
        if not (self.reading >= 0 and self.entropy >= 0):
            raise ConfigError(f"reading is {self.reading} and entropy {self.entropy}; give 0 or more for both")

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """The loss of the jumps in the trace; `answer` is (B, classes), y are labels (B,).

        Raises:
            StructureError: no Jump layer that ran, or one that saw other rows than the batch.
        """
        keeps = [call.keep for call in trace.decisions(Jump)]
        drawn: list[Jumps] = [jump for name in trace.all(Jump) for jump in trace.answers.get(name, [])]
        if not drawn:  # in eval mode, or sequences too short to jump in
            return answer.new_zeros(())
        rows = {jump.chooses.shape[0] for jump in drawn}
        if rows != {y.shape[0]}:
            raise StructureError(
                f"jumps of {sorted(rows)} rows in a batch of {y.shape[0]}; this loss needs every row of the batch once"
            )
        score = torch.stack([jump.score for jump in drawn], 1)
        value = torch.stack([jump.value for jump in drawn], 1)
        chooses = torch.stack([jump.chooses for jump in drawn], 1).to(score.dtype)  # (B, choices)
        log_p = OneOf.log_prob(score, torch.stack([jump.keep for jump in drawn], 1))
        reward = (answer.detach().argmax(1) == y).to(score.dtype) * 2 - 1
        if self.reading:
            reward = reward - self.reading * torch.stack([keep.detach()[..., 0] for keep in keeps]).sum(0)
        missed = reward[:, None] - value
        loss = ((missed.square() - log_p * missed.detach()) * chooses).sum(1).mean()
        if self.entropy:
            entropy = -(score.softmax(-1) * score.log_softmax(-1)).sum(-1)
            loss = loss - self.entropy * (entropy * chooses).sum() / chooses.sum().clamp(min=1)
        return loss


class _Reader(NamedTuple):
    """The progress of all rows.

    Attributes:
        state: of the cell.
        due: (B,) int64, the step that is read next; T where none is left.
        read: (B,) int64, steps read since the last jump.
        jumps: (B,) int64, jumps made.
    """

    state: Any
    due: Tensor
    read: Tensor
    jumps: Tensor


def _columns(reads: Tensor, chooses: Tensor, like: Tensor) -> Tensor:
    """The keep (B, 2) of unit 0 and unit 1, from two masks (B,)."""
    return torch.stack([reads, chooses], 1).to(like.dtype)


def _none(rows: Tensor) -> bool:
    """Whether a mask is empty. False while compiling or exporting, where the graph has to hold every step."""
    return not torch.compiler.is_compiling() and not bool(rows.any())
