"""What a Halt adds so that a session can serve it frame by frame, or one row at a time."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


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
