"""What a model tells a session: how a Halt is served frame by frame or row by row, and what no engine replaces."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class FrameByFrame(ABC):
    """Interface of a Halt over sequences whose frames are served as they arrive: `Session.stream`.

    Sequences at different positions are read together. Step k reads the `every` frames behind frame k * every, so a
    sequence decides after `every` frames, and answers at the latest after `longest`.

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
        """The state of `rows` sequences before their first frame: a pytree of tensors, rows first."""

    @abstractmethod
    def read(self, frame: Any, state: Any) -> Any:
        """The state after one more frame of every row."""

    @abstractmethod
    def conclude(self, steps: Sequence[int], state: Any, memories: Sequence[Any]) -> "Conclusion":
        """The answers after the frames of a step, and which rows continue.

        Args:
            steps: of every row, the step that it has read.
            state: as `read` returned it.
            memories: of every row, the memory of its last conclusion; None at its first.
        """


class PartByPart(ABC):
    """How a Halt runs a row that is made of parts which see each other (the tokens of a sentence): `Halt.part_by_part`.

    A session runs a single row as one graph per step. In a batch such rows have different lengths, and need several.
    """

    @abstractmethod
    def parts(self, halt: Any, x: Any) -> Tensor:
        """The parts (n, ...) that the first step takes of an input with one row."""

    @abstractmethod
    def one_row(self, halt: Any, k: int) -> nn.Module | None:
        """Step k of one row, from its parts to (answer, score, parts); of the last step to (answer,).

        Answer and score are repeated for every part. None: a layer inside decides or has a memory, so that the step
        runs as in a batch.
        """


class CalledInParts(ABC):  # noqa: B024 - a mark, which adds no method
    """A module that no engine may replace.

    Other methods than `forward` are called too, or its answer depends on the whole batch. Its submodules may become
    engines.
    """


class Conclusion(NamedTuple):
    """The answers of rows after a step of frames.

    Attributes:
        answer: a pytree, rows first.
        score: how sure the rows are, (rows, 1), also at steps without a threshold.
        should_continue: (rows,) bool; False at the last step.
        memories: of every row, for its next conclusion.
    """

    answer: Any
    score: Tensor
    should_continue: Tensor
    memories: Sequence[Any]
