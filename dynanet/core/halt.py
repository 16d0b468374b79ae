"""Halt: steps of which later ones run only for the rows that go on. Early exit, cascades, pondering, temporal stops."""

from abc import abstractmethod
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from dynanet.core.confidence import Confidence
from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import StructureError
from dynanet.core.rows import LEADING, Rows
from dynanet.core.serving import PartByPart


class Halt(Dynamic):
    """Runs step after step; after each, rows leave with the answer they have.

    Halting is a selection whose unit is the rest: unit k is "what comes after step k", so the first step is priced
    with what always runs, and unit k costs step k + 1. Use Halt where rows *leave*. Where rows stay because their
    neighbours read them, loop over `run` with a keep that only falls.

    Attributes:
        steps: how many steps there are.
        limit: at most this many steps run, whatever the scores say: the hard cap per sample. None: all.
        rows: how rows leave; a session puts preallocated workspaces here.
        part_by_part: how a session runs a single row that is made of parts; None: as in a batch.
        multi_exit: in training the exits of all steps answer every row, and each is to be trained (`train.MultiExit`).
    """

    steps: int
    limit: int | None = None
    multi_exit: bool = False
    rows: Rows = LEADING
    part_by_part: PartByPart | None = None

    @property
    def last(self) -> int:
        """The last step that may run, counted from 0."""
        return (self.steps if self.limit is None else min(self.limit, self.steps)) - 1

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
        """`should_continue` for a single row in eval mode.

        For rules that can do without tensors, whose overhead counts at batch 1.

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
        last = self.last
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


class ThresholdHalt(Halt):
    """A Halt whose rows leave once their score reaches the threshold of a step.

    In training every row runs every step, for objectives over all exits. `calibrate.calibrate` finds thresholds for a
    budget or a risk. A subclass that has another rule overrides `should_continue`.

    Args:
        exits: how many exits there are, the last included.
        confidence: scores the answers of the exits; None where the scores come from somewhere else.
        threshold: of a new layer. At infinity no row leaves early.

    Attributes:
        thresholds: (exits - 1,), in the units of the score. +inf: no row leaves at this exit; -inf: every row does.

    Raises:
        StructureError: a confidence that does not score every exit but the last.
    """

    thresholds: Tensor
    confidence: Confidence

    def __init__(self, exits: int, confidence: Confidence | None = None, threshold: float = torch.inf) -> None:
        super().__init__()
        self.steps = exits
        self.confidence = confidence  # type: ignore[assignment]  # without one, nothing here reads it
        if confidence is not None and exits > 1:
            confidence.at(exits - 2)  # fail here, not at the first forward
        self.register_buffer("thresholds", torch.full((exits - 1,), threshold))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "should_continue" in vars(cls) and "should_continue_one" not in vars(cls):
            # The shortcut below is of this class's rule, not of a subclass's own.
            cls.should_continue_one = Halt.should_continue_one  # type: ignore[method-assign]

    @property
    def decides(self) -> str:
        """The name of the confidence."""
        return self.confidence.decides if isinstance(self.confidence, Confidence) else ""

    def exit_of(self, k: int) -> int:
        """The exit at the end of step k, counted from 0. Another one than k where exits are switched off."""
        return k

    def should_continue(self, k: int, score: Tensor) -> Tensor:
        """1 where the score is below the threshold of step k; always 1 in training."""
        if self.training:
            return torch.ones_like(score)
        return below_threshold(score, self.thresholds[self.exit_of(k)]).to(score.dtype)

    def should_continue_one(self, k: int, score: Tensor) -> bool:
        """`should_continue` of one row in eval mode, without tensors."""
        value = score.float().tolist()[0][0]
        return value < self.thresholds.float().tolist()[self.exit_of(k)] and value < highest_score(score.dtype)


def highest_score(dtype: torch.dtype) -> float:
    """The score of a row that has nothing left to compute, such as a sequence at its end.

    It is the highest finite number, so that tables of scores can hold it.
    """
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)


def below_threshold(score: Tensor, threshold: Tensor) -> Tensor:
    """Which rows continue, bool: those below the threshold that have something left to compute.

    Compared in float32: a half-precision score would round the threshold and flip ties.
    """
    return (score.float() < threshold.float()) & (score < highest_score(score.dtype))
