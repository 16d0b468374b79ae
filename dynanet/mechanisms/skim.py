"""Skim: at every time step a big cell reads or a small one skims, and skimming renews only the first of the state."""

from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.rows import over_tensors
from dynanet.core.trace import Trace
from dynanet.data.ragged import Sequences, as_sequences
from dynanet.gates.rules import Gumbel, StraightThrough, Threshold
from dynanet.ops.native.library import fit
from dynanet.ops.native.recurrent import PackedCells, Ready, skim


class Skim(Dynamic):
    """Skim-RNN (Seo et al. 2018, arXiv:1711.02085, section 3).

    Unit 0 is the big cell, h = f(x, h). Unit 1 is the small cell, h = [f'(x, h); the rest of h as it was], which renews
    the first `skimmed` features only. One of the two runs at every step; the score of reading is linear in x and h, and
    every row pays for it. In eval mode the choice is the likelier one.

    Training departs from the paper's by default, which did badly here (the card has figures): everything is read at
    first, and the choice is made as in eval mode, with a sigmoid's gradient, which goes to the score and not on through
    the state. The paper draws Gumbel-softmax samples: `rule=Gumbel(), reading=0.0, detached=False`.

    As f' sees the whole state, the small cell's input is x with the rest of h behind it.

    Rows whose sequence has ended decide 0 for both units: of padding only the scores are computed.

    For cells that are both nn.LSTMCell or both nn.GRUCell, with frozen float32 weights on the CPU (in a session, say),
    the sparse form is one native call where native kernels were built. Counted MACs are then in one piece, not by unit.

    `SkimCost` is the term of the loss that makes reading rare.

    Args:
        big: maps (x_t, state) to the next state: nn.GRUCell(inputs, hidden), or nn.LSTMCell, whose state is (h, c).
        small: the same kind of cell, nn.GRUCell(inputs + hidden - skimmed, skimmed).
        inputs: features per time step.
        hidden: size of the state; of h and c each.
        skimmed: how many features of the state the small cell renews, the paper's d'.
        rule: how the score of reading decides; None for `StraightThrough`.
        reading: the score's bias at the start; above 0, all is read at first.
        detached: the score's gradient does not reach the state, and so none runs through the choices of all steps
            before, along which it would explode.
        every_step: answer the states of all steps instead of the last one.

    Raises:
        ConfigError: sizes below 1, or a small cell that renews the whole state or more.
    """

    def __init__(
        self,
        big: nn.Module,
        small: nn.Module,
        inputs: int,
        hidden: int,
        skimmed: int,
        rule: nn.Module | None = None,
        *,
        reading: float = 2.0,
        detached: bool = True,
        every_step: bool = False,
    ) -> None:
        super().__init__()
        if min(inputs, skimmed) < 1 or skimmed >= hidden:
            raise ConfigError(
                f"skim from {inputs} inputs, {skimmed} of {hidden} hidden features; expected at least 1 input, and at "
                f"least 1 feature but not all of them"
            )
        self.big, self.small = big, small
        self._pair = isinstance(big, nn.LSTMCell)  # asked now: a session puts engines in place of cells
        self._packed = PackedCells()
        self.inputs, self.hidden, self.skimmed, self.every_step = inputs, hidden, skimmed, every_step
        self.detached = detached
        self.gate = Gate(nn.Linear(inputs + hidden, 1), rule if rule is not None else StraightThrough())
        nn.init.constant_(self.gate.scorer.bias, reading)

    @property
    def runs_whole(self) -> bool:
        """All steps are one native call: a session has nothing to gain from engines for parts."""
        return self._native() is not None

    def forward(self, x: Tensor | Sequences) -> Tensor:
        """To the state (h of an LSTM) at each row's last step, (B, hidden); with `every_step`, to those of all steps.

        Args:
            x: (B, T, inputs), or `Sequences` of them. Behind a row's end its last state is repeated.

        Returns:
            (B, hidden) or (B, T, hidden).

        Raises:
            InputError: another shape, no step, or impossible lengths.
        """
        x_BTD, lengths = as_sequences(x, self.inputs)
        ready = self._native() if self.gathers and self.force is None and fit(x_BTD) else None
        if ready is not None:
            return self._natively(x_BTD, lengths, ready)
        zero = x_BTD.new_zeros(x_BTD.shape[0], self.hidden)
        state: Any = (zero, zero) if self._pair else zero
        nothing, states = over_tensors(torch.zeros_like, state), []
        for t in range(x_BTD.shape[1]):
            step = (x_BTD[:, t], state)
            seen = _hidden(state).detach() if self.detached else _hidden(state)
            reads, score = self.gate(torch.cat([step[0], seen], 1))
            present = (t < lengths).to(score.dtype)[:, None]
            keep = self.tap(Decision(torch.cat([reads, 1 - reads], 1), score), present=present).keep
            read = self.run(0, self._read, keep[:, 0], step, otherwise=nothing)
            skimmed = self.run(1, self._skim, keep[:, 1], step, otherwise=nothing)
            stays = 1 - keep.sum(1, keepdim=True)
            # A sum, so that gradients of the choice are those of reads * f + (1 - reads) * f'.
            state = over_tensors(lambda a, b, old, stays=stays: a + b + stays * old, read, skimmed, state)
            if self.every_step:
                states.append(_hidden(state))
        return torch.stack(states, 1) if self.every_step else _hidden(state)

    def _native(self) -> Ready | None:
        """What the native kernel takes, if it can run this layer."""
        gate, sizes = self.gate, [(getattr(c, "input_size", 0), getattr(c, "hidden_size", 0)) for c in self._cells]
        small = (self.inputs + self.hidden - self.skimmed, self.skimmed)
        if type(gate) is not Gate or type(gate.rule) not in _HARD or sizes != [(self.inputs, self.hidden), small]:
            return None
        return self._packed.of(self._cells, gate.scorer, around=[gate, gate.rule])

    @property
    def _cells(self) -> list[nn.Module]:
        return [self.big, self.small]

    def _natively(self, x_BTD: Tensor, lengths: Tensor, ready: Ready) -> Tensor:
        """The same in one call: rows run ahead of each other, so that each cell runs for many at once."""
        answer, reads, score = skim(
            x_BTD,
            lengths,
            ready,
            skimmed=self.skimmed,
            threshold=float(getattr(self.gate.rule, "at", 0.0)),
            every_step=self.every_step,
        )
        for t in range(x_BTD.shape[1] if self.trace is not None else 0):
            present, read = (t < lengths).to(reads.dtype)[:, None], reads[:, t : t + 1]
            self.log(Decision(torch.cat([read, present - read], 1), score[:, t : t + 1]))
        return answer

    def _read(self, given: tuple[Tensor, Any]) -> Any:
        return self.big(*given)

    def _skim(self, given: tuple[Tensor, Any]) -> Any:
        x, state = given
        head = over_tensors(lambda t: t[:, : self.skimmed], state)
        head = self.small(torch.cat([x, _hidden(state)[:, self.skimmed :]], 1), head)
        return over_tensors(lambda new, old: torch.cat([new, old[:, self.skimmed :]], 1), head, state)


class SkimCost(Objective):
    """Minus the log-probability of skimming, averaged over the steps of a batch, summed over the Skim layers.

    The paper's second term: weighted with its gamma, `CrossEntropy() + 0.01 * SkimCost()`. `train.BudgetPenalty` counts
    what reading and skimming cost instead.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the scores in the trace; padding does not count.

        Raises:
            StructureError: no Skim layer that ran, or one of whose rows only some were computed.
        """
        names = [name for layer, name in trace.names.items() if isinstance(layer, Skim)]
        layers = [[call for call in trace.calls if call.name == name] for name in names]
        if not any(layers):
            raise StructureError(f"skimming is counted for Skim layers that ran; there are {sorted(trace.keys())}")
        costs = []
        for calls in filter(None, layers):
            scores, keeps = [c.decision.score for c in calls], [c.keep.detach() for c in calls]
            if any(s.shape[0] != k.shape[0] for s, k in zip(scores, keeps, strict=True)):
                raise StructureError("only some rows reached a Skim layer; losses need every row: use train mode")
            there = torch.cat(keeps).sum(1, keepdim=True)
            costs.append((nn.functional.softplus(torch.cat(scores)) * there).sum() / there.sum().clamp(min=1))
        return torch.stack(costs).sum()

    def __repr__(self) -> str:
        return "SkimCost()"


_HARD = (Gumbel, StraightThrough, Threshold)  # in eval mode: what is above a threshold


def _hidden(state: Any) -> Tensor:
    """h of a state: the state itself, or the first of (h, c)."""
    return state[0] if isinstance(state, tuple) else state
