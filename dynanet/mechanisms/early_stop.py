"""Early stop: a recurrent network answers as soon as it is confident; later frames of the sequence are not read."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, InputError, StructureError, check_sizes
from dynanet.core.halt import ThresholdHalt, below_threshold, highest_score
from dynanet.core.objective import Objective
from dynanet.core.rows import over_tensors
from dynanet.core.serving import Conclusion, FrameByFrame
from dynanet.core.trace import Trace
from dynanet.data.ragged import Sequences, as_sequences
from dynanet.gates.confidence import Confidence, MaxProbability
from dynanet.ops.recurrent import hidden_of, zero_state


class EarlyStop(ThresholdHalt, FrameByFrame):
    """Temporal early exit: step k reads the next frames, answers, and stops rows whose score reaches the threshold.

    Every step has the same weights. There are two ways to stop:

    - By confidence: in training every step answers all rows (for `train.MultiExit`). In eval mode a row stops once its
      confidence reaches the threshold of the step. Thresholds start at infinity, so that a new model reads to the end;
      `calibrate.calibrate` finds them for a budget or a risk.
    - By a learned policy (EARLIEST: Hartvigsen et al. 2019, doi:10.1145/3292500.3330974): the policy maps the hidden
      state to the log-odds of stopping. In training stops are drawn, for `Earliest`, and the answer is that of the step
      drawn; in eval mode thresholds start at 0, so that the more probable choice is made. They too can be calibrated.

    A row always stops at the end of its sequence. Frames after its stop or end cost nothing, also while thresholds are
    calibrated. `steps_read` counts the frames read. A session serves frames as they arrive (`Session.stream` of
    `SequenceFrame`).

    Args:
        cell: maps (x_t, state) to the next state: nn.GRUCell, nn.RNNCell, or nn.LSTMCell, whose state is (h, c).
        head: maps the state (h of an LSTM), (rows, hidden), to logits (rows, classes).
        inputs: features per frame.
        hidden: size of the state; of h and c each.
        longest: maximum number of frames of a sequence.
        every: frames read between two decisions.
        confidence: scores logits; None for `MaxProbability`. Not with a policy.
        policy: maps the state (h of an LSTM) to the log-odds of stopping (rows, 1): nn.Linear(hidden, 1).

    Raises:
        ConfigError: sizes below 1, or both a confidence and a policy.
        StructureError: a confidence that does not score every step but the last.
    """

    def __init__(
        self,
        cell: nn.Module,
        head: nn.Module,
        inputs: int,
        hidden: int,
        longest: int,
        *,
        every: int = 1,
        confidence: Confidence | None = None,
        policy: nn.Module | None = None,
    ) -> None:
        check_sizes(inputs=inputs, hidden=hidden, longest=longest, every=every)
        if confidence is not None and policy is not None:
            raise ConfigError("early stop got a confidence and a policy; give one of them")
        if policy is None:
            super().__init__(math.ceil(longest / every), confidence if confidence is not None else MaxProbability())
        else:
            super().__init__(math.ceil(longest / every), threshold=0.0)
        self.frames = Frames(cell, head)
        self.inputs, self.hidden = inputs, hidden
        self.longest, self.every = longest, every
        self.policy = policy
        self.multi_exit = policy is None
        self._pair = isinstance(cell, nn.LSTMCell)  # kept, as a session replaces the cell by an engine

    def start(self, x: Tensor | Sequences) -> Any:
        """Frames, lengths, an empty state, no answer, and no memory of earlier answers.

        Raises:
            InputError: another shape than (B, T, inputs), no frame, impossible lengths, or more than `longest` frames.
        """
        x_BTD, lengths = as_sequences(x, self.inputs)
        if x_BTD.shape[1] > self.longest:
            raise InputError(
                f"sequences of {x_BTD.shape[1]} frames for a layer made for {self.longest} at most; cut them, or make "
                f"it with a larger `longest`"
            )
        state = zero_state(x_BTD, x_BTD.shape[0], self.hidden, pair=self._pair)
        return x_BTD, lengths, state, None, None

    def step(self, k: int, state: Any) -> tuple[Any, Tensor]:
        """Read the frames of step k, and answer. Rows whose sequence has ended keep their answer."""
        x, lengths, hidden, logits, memory = state
        first = k * self.every
        end = min(first + self.every, x.shape[1])
        for t in range(first, end):
            hidden = self.frames.read(x[:, t], hidden, t < lengths)
        if first < end:
            logits = self.frames.answer(hidden_of(hidden), logits, first < lengths)
        if self.policy is None and k + 1 < self.steps:
            memory = self.confidence.at(k).remember(logits, memory)
        return (x, lengths, hidden, logits, memory), logits

    def score(self, k: int, state: Any, answer: Tensor) -> Tensor:
        """The confidence or the log-odds of stopping, (rows, 1); the highest number where a sequence has ended."""
        _, lengths, hidden, _, memory = state
        sure = self.confidence.at(k)(answer, memory) if self.policy is None else self.policy(hidden_of(hidden))
        return torch.where((lengths <= (k + 1) * self.every)[:, None], highest_score(sure.dtype), sure)

    def should_continue(self, k: int, score: Tensor) -> Tensor:
        """1 below the threshold while there are frames left; in training always 1, or drawn from the policy."""
        if self.training and self.policy is not None:
            return torch.bernoulli((-score.detach()).sigmoid())
        return super().should_continue(k, score)

    # In eval mode the rule above is that of ThresholdHalt, and so is its form for one row.
    should_continue_one = ThresholdHalt.should_continue_one

    def frame(self, x: Tensor | Sequences) -> Tensor:
        """The first frames, (B, inputs)."""
        return as_sequences(x, self.inputs).x[:, 0]

    def begin(self, rows: int) -> Any:
        """The state of sequences before their first frame."""
        return zero_state(self.thresholds, rows, self.hidden, pair=self._pair)

    def read(self, frame: Tensor, state: Any) -> Any:
        """The state after a frame (rows, inputs)."""
        return self.frames.cell(frame, state)

    def conclude(self, steps: Sequence[int], state: Any, memories: Sequence[Any]) -> Conclusion:
        """Answers, confidences (after the last step, by the criterion before) or log-odds, and the rows that go on."""
        logits = self.frames.head(hidden_of(state))
        last = self.last
        if self.policy is not None:
            score = self.policy(hidden_of(state))
        else:
            score, memories = self._scored([min(k, max(self.steps - 2, 0)) for k in steps], logits, memories)
        thresholds = torch.cat([self.thresholds[:last], self.thresholds.new_full((1,), -torch.inf)])
        goes_on = below_threshold(score[:, 0], thresholds[[min(k, last) for k in steps]])
        return Conclusion(logits, score, goes_on, memories)

    def _scored(self, steps: Sequence[int], logits: Tensor, memories: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Confidences (rows, 1) and memories of rows at different steps; one call for all rows of a criterion."""
        groups: dict[tuple[Confidence, bool], list[int]] = {}
        for row, (k, memory) in enumerate(zip(steps, memories, strict=True)):
            groups.setdefault((self.confidence.at(k), memory is None), []).append(row)
        score = logits.new_empty(logits.shape[0], 1)
        after = list(memories)
        for (confidence, first), rows in groups.items():
            joined = None if first else tree_map(lambda *t: torch.cat(t), *(memories[row] for row in rows))
            memory = confidence.remember(logits[rows], joined)
            score[rows] = confidence(logits[rows], memory)
            for i, row in enumerate(rows):
                after[row] = over_tensors(lambda t, i=i: t[i : i + 1], memory)
        return score, after


class Frames(Dynamic):
    """The cell (unit 0) and the head (unit 1) of an EarlyStop, run only for sequences that have not ended.

    It makes no decision: `forced` does not change lengths.
    """

    def __init__(self, cell: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, head

    def read(self, x: Tensor, state: Any, present: Tensor) -> Any:
        """The state after a frame x (rows, inputs); unchanged where the sequence has ended."""
        keep = self._present(x, present, first=0)
        return self.run(0, lambda given: self.cell(*given), keep, (x, state), otherwise=state)

    def answer(self, hidden: Tensor, before: Tensor | None, present: Tensor) -> Tensor:
        """The logits of a state; `before`, those of the step before, where the sequence had ended."""
        if before is None:  # no sequence ends before the first step
            return self.head(hidden)
        return self.run(1, self.head, self._present(hidden, present, first=1), hidden, otherwise=before)

    def _present(self, x: Tensor, present: Tensor, first: int) -> Tensor:
        there = present.to(x.dtype)[:, None]
        return self.tap(Decision(there, there), first=first, pinned=there, present=there).keep[:, 0]


@dataclass(frozen=True)
class Earliest(Objective):
    """Trains the policy of an EarlyStop: `CrossEntropy() + Earliest(0.1)`.

    EARLIEST (Hartvigsen et al. 2019, doi:10.1145/3292500.3330974): REINFORCE with a reward of 1 for a right answer and
    -1 for a wrong one, for every decision up to the stop, plus earliness * (minus the log-probability of stopping,
    summed over these decisions). The baseline is the mean reward of the other rows of the batch. The end of a sequence
    is not a decision. In eval mode (validation), where nothing is drawn, the loss is 0.

    Args:
        earliness: the paper's lambda: the larger, the earlier rows stop.
        halt: name of the EarlyStop; None where the model has only one.

    Raises:
        ConfigError: a negative earliness.
    """

    earliness: float
    _: KW_ONLY
    halt: str | None = None

    def __post_init__(self) -> None:
        if not self.earliness >= 0:
            raise ConfigError(f"earliness is {self.earliness}; expected the weight of stopping early, 0 or more")

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """The loss of the log-odds in the trace; `answer` (B, classes) is that of the drawn step, y are labels (B,).

        Raises:
            StructureError: no EarlyStop with a policy, several and none named, or rows that were not computed.
        """
        layer, name = trace.one(EarlyStop, self.halt)
        if layer.policy is None:
            raise StructureError(f"{name!r} stops by confidence, not by a policy; use train.MultiExit")
        calls = trace.complete(name) if layer.training else []
        if not calls:
            return answer.new_zeros(())
        score = torch.cat([call.decision.score for call in calls], 1)  # (B, decisions), log-odds of stopping
        waited = torch.cat([call.keep.detach() for call in calls], 1)  # 1 at decisions before the stop
        decides = torch.cat([torch.ones_like(waited[:, :1]), waited[:, :-1]], 1) * (score < highest_score(score.dtype))
        # At the end of a sequence the score is the highest number, whose logarithm would give 0 * inf below.
        score = score.where(decides > 0, 0.0)
        stop = functional.logsigmoid(score)
        wait = functional.logsigmoid(-score)
        reward = (answer.detach().argmax(1) == y).to(score.dtype) * 2 - 1
        rows = reward.shape[0]
        advantage = (reward - reward.mean()) * (rows / (rows - 1)) if rows > 1 else reward
        drawn = ((waited * wait + (1 - waited) * stop) * decides).sum(1)
        return (-drawn * advantage - self.earliness * (stop * decides).sum(1)).mean()


def steps_read(trace: Trace, halt: str | None = None) -> Tensor:
    """Number of frames of every sequence that were read, (B,); times the seconds between frames, a latency.

    Raises:
        StructureError: no EarlyStop ran, or several are in the model and `halt` does not name one.
    """
    return trace.runs(trace.names[trace.one(EarlyStop, halt)[0].frames])
