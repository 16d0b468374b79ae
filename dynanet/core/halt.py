"""Halt: steps of which later ones run only for the rows that go on. Early exit, cascades, pondering, temporal stops."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import StructureError
from dynanet.core.rows import LEADING, Rows


class Halt(Dynamic):
    """Runs step after step; after each, rows leave with the answer they have.

    Halting is a selection whose unit is the rest: unit k is "what comes after step k", so the first step is priced
    with what always runs, and unit k costs step k + 1. Use Halt where rows *leave*. Where rows stay because their
    neighbours read them, loop over `run` with a keep that only falls.

    Attributes:
        steps: how many steps there are.
        limit: at most this many steps run, whatever the scores say: the hard cap per sample. None: all.
        rows: how rows leave; a session puts preallocated workspaces here.
    """

    steps: int
    limit: int | None = None
    rows: Rows = LEADING

    @abstractmethod
    def start(self, x: Any) -> Any:
        """The state before the first step: a pytree whose rows leave together."""

    @abstractmethod
    def step(self, k: int, state: Any) -> tuple[Any, Any]:
        """One stage, glimpse or ponder step: from the state to (state, answer)."""

    @abstractmethod
    def score(self, k: int, state: Any, answer: Any) -> Tensor:
        """How sure a row is (or whatever the rule asks for) after step k: (rows, 1)."""

    @abstractmethod
    def should_continue(self, k: int, score: Tensor) -> Tensor:
        """The rule: does the rest run for a row? keep (rows, 1); soft in training where the rule is soft.

        Apart from `score`, so that an engine may compute step and score in one graph while thresholds stay free.
        """

    def should_continue_one(self, k: int, score: Tensor) -> bool:
        """`should_continue` for a row by itself, in eval mode. For rules that need no tensors: beside one row these
        cost.

        Args:
            k: the step.
            score: (n, 1), one number n times.
        """
        return bool(self.should_continue(k, score[:1]).item())

    def forward(self, x: Any) -> Any:
        """Every row's answer from the step at which it left.

        Raises:
            StructureError: a limit below 1.
        """
        if self.limit is not None and self.limit < 1:
            raise StructureError(f"limit is {self.limit}, but the first step always runs; set it to 1 or more, or None")
        state, before = self.start(x), []
        last = (self.steps if self.limit is None else min(self.limit, self.steps)) - 1
        with ExitStack() as frames:
            for k in range(last + 1):
                state, answer = self.step(k, state)
                if self.trace is not None:
                    self.trace.log_answer(self, answer)
                if k == last:
                    break
                score = self.score(k, state, answer)
                keep = self.tap(Decision(self.should_continue(k, score), score), first=k).keep[..., 0]
                kept = self.kept(keep, self.rows)
                if self.trace is not None:
                    frames.enter_context(self.within(kept.frame(self, k)))
                if kept.empty:
                    break
                before.append((kept, answer))
                state = kept.take(state)
        for kept, earlier in reversed(before):
            answer = kept.put(answer, otherwise=earlier)
        return answer

    def answers(self, x: Any) -> list[Any]:
        """The answer of every step for all rows, whatever the scores say: anytime prediction."""
        state, answers = self.start(x), []
        for k in range(self.steps):
            state, answer = self.step(k, state)
            answers.append(answer)
        return answers


def highest_score(dtype: torch.dtype) -> float:
    """The score of a row that has nothing left to do (a sequence at its end): the highest finite one, which tables of
    scores can hold.
    """
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)


def below_threshold(score: Tensor, threshold: Tensor) -> Tensor:
    """Who goes on, bool: below the threshold, and with something left to do.

    Compared in float32: a half-precision score would round the threshold and let out who is tied with it.
    """
    return (score.float() < threshold.float()) & (score < highest_score(score.dtype))


class FrameByFrame(ABC):
    """What a Halt over sequences adds so that frames can be served as they arrive: `Session.stream`.

    Sequences that are not equally far are read together. Step k reads the `every` frames behind frame k * every, so a
    sequence decides after every so many frames, and answers at the latest after `longest`.

    Attributes:
        every: frames read between two decisions.
        longest: frames of the longest sequence that is read.
    """

    every: int
    longest: int

    @abstractmethod
    def frame(self, x: Any) -> Any:
        """The first frame of every sequence of an input (rows first), as `read` takes it."""

    @abstractmethod
    def begin(self, rows: int) -> Any:
        """The state of so many sequences before their first frame: a pytree of tensors, rows first."""

    @abstractmethod
    def read(self, frame: Any, state: Any) -> Any:
        """The state after one more frame of every row."""

    @abstractmethod
    def conclude(self, steps: Sequence[int], state: Any, memories: Sequence[Any]) -> "Conclusion":
        """The answers after the frames of a step, and who goes on.

        Args:
            steps: of every row, the step that it has read.
            state: as `read` answered it.
            memories: of every row, what its last conclusion remembered; None at its first.
        """


class PartByPart(ABC):
    """What a Halt adds whose rows are made of parts that see each other (the tokens of a sentence), so that a session
    can run one row by itself as one graph per step. In a batch such rows have different lengths, and need several.
    """

    @abstractmethod
    def parts(self, x: Any) -> Tensor:
        """What the first step takes of an input with one row: (n, ...), its parts."""

    @abstractmethod
    def one_row(self, k: int) -> nn.Module | None:
        """Step k of one row, from its parts to (answer, score, parts), the last step to (answer,). The first two stand
        once per part, all alike. None: something inside decides, or must be remembered, and takes the usual way.
        """


class Conclusion(NamedTuple):
    """What rows answer after a step of frames.

    Attributes:
        answer: a pytree, rows first.
        score: how sure the rows are, (rows, 1), whether or not somebody asks at this step.
        should_continue: (rows,) bool; False at the last step.
        memories: of every row, for its next conclusion.
    """

    answer: Any
    score: Tensor
    should_continue: Tensor
    memories: Sequence[Any]
