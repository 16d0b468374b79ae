"""Refill: rows that go on past a step wait for each other, so that batches stay full."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dynanet.core.halt import Halt
from dynanet.core.rows import over_tensors, take_rows
from dynanet.infer.parts import StagedHalt


class Line:
    """Rows on their way through a Halt, waiting at each step until a batch is full.

    Rows leave a state as `Halt.rows` says, and states join by concatenating their tensors along the first axis.
    """

    def __init__(self, halt: Halt, batch: int, ready: dict[int, Any]):
        self.halt, self.batch, self.ready = halt, batch, ready
        self.last = (halt.steps if halt.limit is None else min(halt.limit, halt.steps)) - 1
        self.waiting: list[list[tuple[Any, list[int]]]] = [[] for _ in range(halt.steps)]

    def arrive(self, x: Any, numbers: Iterable[int]) -> None:
        """New rows; steps whose batch is full run."""
        self.waiting[0].append((self.halt.start(x), list(numbers)))
        self._drain(full_only=True)

    def finish(self) -> None:
        """No more rows will come."""
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
            keep = self.halt.goes_on(k, self.halt.score(k, state, answer))[..., 0]
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
        """Up to a batch of the rows that wait at step k."""
        groups, self.waiting[k] = self.waiting[k], []
        numbers = [n for _, ns in groups for n in ns]
        state = groups[0][0] if len(groups) == 1 else tree_map(_joined, *[s for s, _ in groups])
        if len(numbers) > self.batch:
            device = next(leaf.device for leaf in tree_flatten(state)[0] if isinstance(leaf, Tensor))
            now, later = torch.arange(len(numbers), device=device).split([self.batch, len(numbers) - self.batch])
            self.waiting[k] = [(self._taken(state, len(numbers), later), numbers[self.batch :])]
            state, numbers = self._taken(state, len(numbers), now), numbers[: self.batch]
        return state, numbers

    def _taken(self, state: Any, rows: int, index: Tensor) -> Any:
        if isinstance(self.halt, StagedHalt):  # a copy in any case: its engines and workspaces are written again
            return over_tensors(lambda t: take_rows(t, index), state)
        return self.halt.rows.take(state, (rows,), index)


def _joined(*parts: Any) -> Any:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
