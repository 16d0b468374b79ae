"""Streams: samples between steps, or frames of many sequences, wait for each other and run in full batches."""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dynanet.core.errors import InputError
from dynanet.core.halt import Halt
from dynanet.core.rows import over_tensors, take_rows
from dynanet.core.serving import FrameByFrame
from dynanet.session.compiled import CompiledHalt
from dynanet.session.inputs import check_input


class StepQueue:
    """Rows on their way through a Halt, waiting at each step until a batch is full.

    Rows are taken from a state by `Halt.rows`, and states are joined by concatenating their tensors along the first
    axis.

    Args:
        halt: the model.
        batch: rows per step.
        ready: receives the answers, by the number of the sample.
    """

    def __init__(self, halt: Halt, batch: int, ready: dict[int, Any]) -> None:
        self.halt = halt
        self.batch = batch
        self.ready = ready
        self.last = halt.last
        self.waiting: list[list[tuple[Any, list[int]]]] = [[] for _ in range(halt.steps)]

    def arrive(self, x: Any, numbers: Iterable[int]) -> None:
        """Add rows, and run the steps whose batch is full."""
        self.waiting[0].append((self.halt.start(x), list(numbers)))
        self._drain(full_only=True)

    def finish(self) -> None:
        """Run all waiting rows: no more will arrive."""
        self._drain(full_only=False)

    def _drain(self, *, full_only: bool) -> None:
        for k in range(self.last + 1):
            while (rows := sum(len(numbers) for _, numbers in self.waiting[k])) >= self.batch or (
                rows and not full_only
            ):
                self._run(k)

    def _run(self, k: int) -> None:
        state, numbers = self._merged(k)
        state, answer = self.halt.step(k, state)
        stays: list[int] = []
        if k < self.last:
            keep = self.halt.should_continue(k, self.halt.score(k, state, answer))[..., 0]
            index = keep.nonzero().squeeze(1)
            stays = index.tolist()
            if stays:
                self.waiting[k + 1].append((self._taken(state, len(numbers), index), [numbers[i] for i in stays]))
        leaves, structure = tree_flatten(answer)
        going = set(stays)
        for i, number in enumerate(numbers):
            if i not in going:
                answers = [t[i].clone() if isinstance(t, Tensor) else t for t in leaves]
                self.ready[number] = tree_unflatten(answers, structure)

    def _merged(self, k: int) -> tuple[Any, list[int]]:
        """Up to a batch of the rows that wait at step k, and their numbers."""
        groups = self.waiting[k]
        self.waiting[k] = []
        numbers = [n for _, ns in groups for n in ns]
        state = groups[0][0] if len(groups) == 1 else tree_map(_joined, *[s for s, _ in groups])
        if len(numbers) > self.batch:
            device = next(leaf.device for leaf in tree_flatten(state)[0] if isinstance(leaf, Tensor))
            now, later = torch.arange(len(numbers), device=device).split([self.batch, len(numbers) - self.batch])
            self.waiting[k] = [(self._taken(state, len(numbers), later), numbers[self.batch :])]
            state = self._taken(state, len(numbers), now)
            numbers = numbers[: self.batch]
        return state, numbers

    def _taken(self, state: Any, rows: int, index: Tensor) -> Any:
        if isinstance(self.halt, CompiledHalt):  # always a copy: engines and workspaces overwrite their memory
            return over_tensors(lambda t: take_rows(t, index), state)
        return self.halt.rows.take(state, (rows,), index)


class SequenceFrame(NamedTuple):
    """A frame of a sequence.

    Attributes:
        sequence: its name; an unknown name begins a sequence.
        x: the frame, without a batch axis.
    """

    sequence: Hashable
    x: Any


class EndOfSequence(NamedTuple):
    """The end of a sequence. Its name is forgotten, and may begin another one."""

    sequence: Hashable


class SequenceAnswer(NamedTuple):
    """The answer of a sequence.

    Attributes:
        sequence: its name.
        answer: without a batch axis.
        confidence: the score of the step that answered, in the units of the model's thresholds.
        frames: number of frames read.
    """

    sequence: Hashable
    answer: Any
    confidence: float
    frames: int


class StreamingSession:
    """Serves sequences that arrive frame by frame, many at a time; made by `Session.sequences`.

    A sequence is open from its first frame until it is answered: when the rule stops it, after the model's `longest`
    frames, or at `end`. Frames after the answer are ignored. Names of answered sequences are kept until `end`: call it
    for every sequence, or memory grows.

    Frames run when `batch` of them wait, or one of every open sequence, or when the next frame of a waiting sequence
    arrives. So an answer is delayed by less than one frame of its own sequence; with a batch of 1 it is not delayed.

    An `InputError` changes nothing: the session can be used further. Threads may call it at the same time; it cannot be
    pickled or copied.
    """

    def __init__(
        self,
        halt: FrameByFrame,
        x: Any,
        batch: int,
        device: torch.device,
        within: Callable[[], AbstractContextManager],
        lock: AbstractContextManager,
    ) -> None:
        self._halt = halt
        self._example = halt.frame(x)
        self._batch = batch
        self._device = device
        self._within = within
        self._lock = lock
        self._open: dict[Hashable, _Progress] = {}
        self._answered: set[Hashable] = set()
        self._waiting: dict[Hashable, Any] = {}
        self._places = _Places(halt.begin)

    @torch.no_grad()
    def read(self, sequence: Hashable, x: Any) -> list[SequenceAnswer]:
        """Add a frame, and return the answers that are now ready, of any sequences.

        Raises:
            InputError: a frame of another shape or dtype than the model takes, NaN or infinite values.
        """
        with self._lock:
            if sequence in self._answered:
                return []
            frame = over_tensors(lambda t: t[None], x)
            try:
                check_input(frame, self._example)
            except InputError as error:
                before = self._open[sequence].frames if sequence in self._open else 0
                number = before + (sequence in self._waiting)
                raise InputError(f"frame {number} of sequence {sequence!r}: {error}") from error
            ready = self._run() if sequence in self._waiting else []
            if sequence in self._answered:
                return ready
            if sequence not in self._open:
                self._open[sequence] = _Progress(self._places.take())
            self._waiting[sequence] = frame
            if len(self._waiting) >= min(self._batch, len(self._open)):
                ready += self._run()
            return ready

    def __reduce__(self) -> Any:
        """Refuse.

        Raises:
            InputError: always.
        """
        raise InputError(
            "sequences that are being served cannot be pickled or copied; copy the session, and call its `sequences`"
        )

    @torch.no_grad()
    def end(self, sequence: Hashable) -> list[SequenceAnswer]:
        """End a sequence, and return the answers that are now ready, its own included if it was still open.

        Raises:
            InputError: an unknown sequence.
        """
        with self._lock:
            if sequence not in self._open and sequence not in self._answered:
                raise InputError(
                    f"the end of sequence {sequence!r}, of which nothing was read; end a sequence after its frames"
                )
            ready = self._run() if sequence in self._waiting else []
            ready += self._finish([sequence] if sequence in self._open else [])
            self._answered.discard(sequence)
            return ready

    @torch.no_grad()
    def end_all(self) -> list[SequenceAnswer]:
        """End all sequences, and return the remaining answers."""
        with self._lock:
            ready = self._run()
            ready += self._finish(list(self._open))
            self._answered.clear()
            return ready

    def _run(self) -> list[SequenceAnswer]:
        """Read the frames that wait."""
        names = list(self._waiting)
        frames = list(self._waiting.values())
        self._waiting.clear()
        if not names:
            return []
        rows = [self._open[name] for name in names]
        x = tree_map(lambda *t: torch.cat(t).to(self._device), *frames)
        with self._within():
            state = self._halt.read(x, self._places.states(rows))
        self._places.keep(rows, state)
        for row in rows:
            row.frames += 1
        every, longest = self._halt.every, self._halt.longest
        due = [row.frames % every == 0 or row.frames == longest for row in rows]
        return self._conclude([name for name, now in zip(names, due, strict=True) if now])

    def _finish(self, names: Sequence[Hashable]) -> list[SequenceAnswer]:
        """End sequences; those that have read frames since their last answer conclude again."""
        ready = self._conclude([name for name in names if self._open[name].concluded < self._open[name].frames])
        return ready + [self._answer(name) for name in names if name in self._open]

    def _conclude(self, names: Sequence[Hashable]) -> list[SequenceAnswer]:
        """Compute new answers of sequences, and return those of sequences that stop here."""
        if not names:
            return []
        rows = [self._open[name] for name in names]
        steps = [(row.frames - 1) // self._halt.every for row in rows]
        with self._within():
            ends = self._halt.conclude(steps, self._places.states(rows), [row.memory for row in rows])
        sure = ends.score[:, 0].tolist()
        for i, row in enumerate(rows):
            row.concluded = row.frames
            row.memory = ends.memories[i]
            row.answer = over_tensors(lambda t, i=i: t[i].clone(), ends.answer), sure[i]
        return [self._answer(name) for name, on in zip(names, ends.should_continue.tolist(), strict=True) if not on]

    def _answer(self, name: Hashable) -> SequenceAnswer:
        row = self._open.pop(name)
        self._places.give(row.place)
        self._answered.add(name)
        return SequenceAnswer(name, *row.answer, row.frames)


class _Progress:
    """How far an open sequence is, and where its state lies."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.frames = 0
        self.concluded = 0  # frames at the last answer
        self.answer: tuple[Any, float] = (None, math.nan)
        self.memory: Any = None


class _Places:
    """States of open sequences, in memory that is reused."""

    def __init__(self, begin: Callable[[int], Any]) -> None:
        # Cloned, as a model may begin with one tensor in two places.
        self._begin = lambda rows: over_tensors(torch.clone, begin(rows))
        self._count = 8
        self._state = self._begin(self._count)
        self._free = list(range(self._count))

    def take(self) -> int:
        """Reserve a place, with the state before the first frame."""
        if not self._free:
            old = self._state
            self._free = list(range(self._count, 2 * self._count))
            self._state = self._begin(2 * self._count)
            self._put(torch.arange(self._count), old)
            self._count *= 2
        place = self._free.pop()
        self._put(torch.tensor([place]), self._begin(1))
        return place

    def give(self, place: int) -> None:
        """Release a place."""
        self._free.append(place)

    def states(self, rows: Sequence[_Progress]) -> Any:
        """The states of rows, as a batch."""
        index = torch.tensor([row.place for row in rows])
        return over_tensors(lambda t: t.index_select(0, index.to(t.device)), self._state)

    def keep(self, rows: Sequence[_Progress], state: Any) -> None:
        """Store the states of rows."""
        self._put(torch.tensor([row.place for row in rows]), state)

    def _put(self, index: Tensor, state: Any) -> None:
        over_tensors(lambda all_of_them, new: all_of_them.index_copy_(0, index.to(new.device), new), self._state, state)


def _joined(*parts: Any) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
