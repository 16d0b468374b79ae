"""Early stop: a recurrent network answers as soon as it has seen enough of a sequence; what comes later is not read."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, InputError, StructureError
from dynanet.core.halt import ThresholdHalt, below_threshold, highest_score
from dynanet.core.objective import Objective
from dynanet.core.rows import over_tensors
from dynanet.core.serving import Conclusion, FrameByFrame
from dynanet.core.trace import Trace
from dynanet.data.ragged import Sequences, as_sequences
from dynanet.gates.confidence import Confidence, MaxProbability


class EarlyStop(ThresholdHalt, FrameByFrame):
    """Temporal early exit: step k reads the next frames, answers, and lets go whoever is sure enough.

    Every step has the same weights. Two ways to stop:

    - By confidence: in training every step answers all rows (for `train.MultiExit`). In eval mode a row stops once its
      confidence reaches the step's threshold. Thresholds start at infinity, so that a new model reads to the end;
      `calibrate.calibrate` finds them for a budget or a risk.
    - By a learned policy (EARLIEST: Hartvigsen et al. 2019, doi:10.1145/3292500.3330974): the policy maps the hidden
      state to the log-odds of stopping. In training stops are drawn, for `Earliest`, and the answer is that of the step
      drawn; in eval mode thresholds of 0 stop where stopping is likelier than not. They too can be calibrated.

    A row always stops at the end of its sequence. Frames behind a row's stop or end cost nothing, also where thresholds
    are being found. `steps_read` says how early rows stopped. A session serves frames as they arrive
    (`Session.stream` of `SequenceFrame`).

    Args:
        cell: maps (x_t, state) to the next state: nn.GRUCell, nn.RNNCell or alike; an nn.LSTMCell has the state (h, c).
        head: from the state (h of an LSTM), (rows, hidden), to logits (rows, classes).
        inputs: features per frame.
        hidden: size of the state; of h and c each.
        longest: frames of the longest sequence that will come.
        every: frames read between two decisions.
        confidence: how sure logits are; None for `MaxProbability`. Not with a policy.
        policy: from the state (h of an LSTM) to the log-odds of stopping (rows, 1): nn.Linear(hidden, 1).

    Attributes:
        thresholds: (steps - 1,), in the units of confidence or policy. +inf: nobody stops here; -inf: everybody.

    Raises:
        ConfigError: sizes below 1, or both a confidence and a policy.
        StructureError: a confidence that does not speak of every step.
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
        if min(inputs, hidden, longest, every) < 1 or (confidence is not None and policy is not None):
            raise ConfigError(
                f"early stop of {inputs} inputs, {hidden} hidden features, at most {longest} frames, {every} at a "
                f"time; expected numbers of at least 1, and a confidence or a policy, not both"
            )
        if policy is None:
            super().__init__(math.ceil(longest / every), confidence if confidence is not None else MaxProbability())
        else:
            super().__init__(math.ceil(longest / every), threshold=0.0)
        self.frames, self.inputs, self.hidden = Frames(cell, head), inputs, hidden
        self.longest, self.every = longest, every
        self._pair = isinstance(cell, nn.LSTMCell)  # asked now: a session puts an engine in the cell's place
        self.policy = policy

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
        return x_BTD, lengths, self._nothing_read(x_BTD, x_BTD.shape[0]), None, None

    def step(self, k: int, state: Any) -> tuple[Any, Tensor]:
        """The frames of step k, and the answer after them. Rows that have ended keep their answer."""
        x, lengths, hidden, logits, memory = state
        first, end = k * self.every, min((k + 1) * self.every, x.shape[1])
        for t in range(first, end):
            hidden = self.frames.read(x[:, t], hidden, t < lengths)
        if first < end:
            logits = self.frames.answer(_hidden(hidden), logits, first < lengths)
        if self.policy is None and k + 1 < self.steps:
            memory = self.confidence.at(k).remember(logits, memory)
        return (x, lengths, hidden, logits, memory), logits

    def score(self, k: int, state: Any, answer: Tensor) -> Tensor:
        """The confidence, or the log-odds of stopping, (rows, 1); as high as can be where a sequence has ended."""
        _, lengths, hidden, _, memory = state
        sure = self.confidence.at(k)(answer, memory) if self.policy is None else self.policy(_hidden(hidden))
        return torch.where((lengths <= (k + 1) * self.every)[:, None], highest_score(sure.dtype), sure)

    def should_continue(self, k: int, score: Tensor) -> Tensor:
        """Below the threshold while there are frames left; in training always, or as drawn from the policy."""
        if self.training and self.policy is not None:
            return torch.bernoulli((-score.detach()).sigmoid())
        return super().should_continue(k, score)

    should_continue_one = ThresholdHalt.should_continue_one

    def frame(self, x: Tensor | Sequences) -> Tensor:
        """The first frames, (B, inputs)."""
        return as_sequences(x, self.inputs).x[:, 0]

    def begin(self, rows: int) -> Any:
        """The state of sequences of which nothing was read."""
        return self._nothing_read(self.thresholds, rows)

    def read(self, frame: Tensor, state: Any) -> Any:
        """The state after a frame (rows, inputs)."""
        return self.frames.cell(frame, state)

    def conclude(self, steps: Sequence[int], state: Any, memories: Sequence[Any]) -> Conclusion:
        """Answers, confidences (of the last step: as of the one before) or log-odds of stopping, and who goes on."""
        logits = self.frames.head(_hidden(state))
        last = self.last
        if self.policy is not None:
            score = self.policy(_hidden(state))
        else:
            score, memories = self._scored([min(k, max(self.steps - 2, 0)) for k in steps], logits, memories)
        thresholds = torch.cat([self.thresholds[:last], self.thresholds.new_full((1,), -torch.inf)])
        return Conclusion(
            logits, score, below_threshold(score[:, 0], thresholds[[min(k, last) for k in steps]]), memories
        )

    def _scored(self, steps: Sequence[int], logits: Tensor, memories: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Confidences (rows, 1) and memories of rows at different steps; those that are scored alike, together."""
        alike: dict[tuple[Confidence, bool], list[int]] = {}
        for row, (k, memory) in enumerate(zip(steps, memories, strict=True)):
            alike.setdefault((self.confidence.at(k), memory is None), []).append(row)
        score, after = logits.new_empty(logits.shape[0], 1), list(memories)
        for (confidence, forgot), rows in alike.items():
            joined = None if forgot else tree_map(lambda *t: torch.cat(t), *(memories[row] for row in rows))
            memory = confidence.remember(logits[rows], joined)
            score[rows] = confidence(logits[rows], memory)
            for i, row in enumerate(rows):
                after[row] = over_tensors(lambda t, i=i: t[i : i + 1], memory)
        return score, after

    def _nothing_read(self, like: Tensor, rows: int) -> Any:
        zero = like.new_zeros(rows, self.hidden)
        return (zero, zero) if self._pair else zero


class Frames(Dynamic):
    """The part of an EarlyStop that costs: the cell (unit 0) and the head (unit 1), for rows that have not ended.

    Nothing is decided here: a sequence lasts as long as it does, whatever is forced.
    """

    def __init__(self, cell: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.cell, self.head = cell, head

    def read(self, x: Tensor, state: Any, present: Tensor) -> Any:
        """The state after a frame (rows, inputs), as it was where the sequence has ended."""
        keep = self._there(x, present, first=0)
        return self.run(0, lambda given: self.cell(*given), keep, (x, state), otherwise=state)

    def answer(self, hidden: Tensor, before: Tensor | None, present: Tensor) -> Tensor:
        """The logits of a state; those given before where the sequence had ended."""
        if before is None:  # at the first step every sequence is there
            return self.head(hidden)
        return self.run(1, self.head, self._there(hidden, present, first=1), hidden, otherwise=before)

    def _there(self, x: Tensor, present: Tensor, first: int) -> Tensor:
        there = present.to(x.dtype)[:, None]
        return self.tap(Decision(there, there), first=first, pinned=there, present=there).keep[:, 0]


class Earliest(Objective):
    """Trains the policy of an EarlyStop (EARLIEST: Hartvigsen et al. 2019): `CrossEntropy() + Earliest(0.1)`.

    REINFORCE with a reward of 1 for a right answer and -1 for a wrong one, for every decision up to the stop; and
    earliness * (minus the log-probability of stopping, summed over these decisions). The baseline is the mean reward of
    the other rows of the batch. Decisions at the end of a sequence are none. Where nothing is drawn because the model
    is in eval mode (validation), it is 0.

    Args:
        earliness: the paper's lambda: the larger, the earlier rows stop.
        halt: the name of the EarlyStop; None where the model has only one.

    Raises:
        ConfigError: a negative earliness.
    """

    def __init__(self, earliness: float, *, halt: str | None = None) -> None:
        if not earliness >= 0:
            raise ConfigError(f"earliness is {earliness}; expected the weight of stopping early, 0 or more")
        self.earliness, self.halt = earliness, halt

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """Over the log-odds in the trace; `answer` is that of the drawn step, (B, classes).

        Raises:
            StructureError: no EarlyStop with a policy, several and none named, or rows that were not computed.
        """
        layer, name = trace.one(EarlyStop, self.halt)
        calls = [call for call in trace.calls if call.name == name]
        if layer.policy is None:
            raise StructureError(f"{name!r} stops by confidence, which is not trained so; use train.MultiExit")
        if not layer.training or not calls:
            return answer.new_zeros(())
        if any(call.decision.score.shape[0] != y.shape[0] for call in calls):
            raise StructureError(f"only some rows reached {name!r}; this loss needs every row: use train mode")
        score = torch.cat([call.decision.score for call in calls], 1)  # (B, decisions), log-odds of stopping
        waited = torch.cat([call.keep.detach() for call in calls], 1)  # those before the stop, all 1
        decides = torch.cat([torch.ones_like(waited[:, :1]), waited[:, :-1]], 1) * (score < highest_score(score.dtype))
        score = score.where(decides > 0, 0.0)
        stop, wait = functional.logsigmoid(score), functional.logsigmoid(-score)
        reward = (answer.detach().argmax(1) == y).to(score.dtype) * 2 - 1
        rows = reward.shape[0]
        advantage = (reward - reward.mean()) * (rows / (rows - 1)) if rows > 1 else reward
        drawn = ((waited * wait + (1 - waited) * stop) * decides).sum(1)
        return (-drawn * advantage - self.earliness * (stop * decides).sum(1)).mean()

    def __repr__(self) -> str:
        return f"Earliest({self.earliness:g}, halt={self.halt!r})"


def steps_read(trace: Trace, halt: str | None = None) -> Tensor:
    """How many frames of every sequence were read, (B,); times the seconds between frames it is a latency.

    Args:
        trace: of a pass.
        halt: the name of the EarlyStop; None where the model has only one.

    Raises:
        StructureError: no EarlyStop, several and none named, or one that did not run.
    """
    return trace.runs(trace.names[trace.one(EarlyStop, halt)[0].frames])


def _hidden(state: Any) -> Tensor:
    """h of a state: the state itself, or the first of (h, c)."""
    return state[0] if isinstance(state, tuple) else state
