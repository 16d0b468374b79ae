"""Skim: at every time step a big cell reads, or a small cell skims and updates only the first part of the state."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError
from dynanet.core.gate import Gate, Rule
from dynanet.core.objective import Objective
from dynanet.core.rows import over_tensors
from dynanet.core.trace import Trace
from dynanet.data.ragged import Sequences, as_sequences
from dynanet.gates.rules import BinaryRule, StraightThrough
from dynanet.ops.native.library import fit
from dynanet.ops.native.recurrent import PackedCells, Ready, skim
from dynanet.ops.recurrent import hidden_of, zero_state


class Skim(Dynamic):
    """Skim-RNN (Seo et al. 2018, arXiv:1711.02085, section 3).

    Unit 0 is the big cell, h = f(x, h). Unit 1 is the small cell, h = [f'(x, h); the rest of h unchanged], which
    updates the first `skimmed` features only. One of the two runs at every step; the score of reading is linear in x
    and h, and every row computes it. In eval mode the more probable of the two runs.

    The training of the paper did badly here (the card has figures), so the default differs: the big cell runs at first,
    and the choice is made as in eval mode, with the gradient of a sigmoid, which reaches the score but not the state
    behind it. For the paper's Gumbel-softmax samples: `rule=Gumbel(), reading=0.0, detached=False`.

    As f' sees the whole state, the input of the small cell is x joined with the rest of h.

    Rows whose sequence has ended keep neither unit: of padding only the scores are computed.

    For cells that are both nn.LSTMCell or both nn.GRUCell, with frozen float32 weights on the CPU (as in a session),
    the sparse form is one native call where native kernels were built. MACs are then counted in one piece, not by unit.

    `SkimCost` is the term of the loss that makes reading rare.

    Args:
        big: maps (x_t, state) to the next state: nn.GRUCell(inputs, hidden), or nn.LSTMCell, whose state is (h, c).
        small: the same kind of cell, nn.GRUCell(inputs + hidden - skimmed, skimmed).
        inputs: features per time step.
        hidden: size of the state; of h and c each.
        skimmed: features of the state that the small cell updates, the paper's d'.
        rule: how the score of reading decides; None for `StraightThrough`.
        reading: initial bias of the score; above 0, the big cell runs at every step at first.
        detached: the gradient of the score does not reach the state, and so does not flow through the choices of all
            earlier steps, where it would explode.
        every_step: answer the states of all steps instead of the last one.

    Raises:
        ConfigError: sizes below 1, or a small cell that updates the whole state or more.
    """

    def __init__(
        self,
        big: nn.Module,
        small: nn.Module,
        inputs: int,
        hidden: int,
        skimmed: int,
        rule: Rule | None = None,
        *,
        reading: float = 2.0,
        detached: bool = True,
        every_step: bool = False,
    ) -> None:
        super().__init__()
        if min(inputs, skimmed) < 1 or skimmed >= hidden:
            raise ConfigError(
                f"skim got {inputs} inputs and skims {skimmed} of {hidden} hidden features; expected at least 1 input, "
                f"and at least 1 feature but not all of them"
            )
        self.big, self.small = big, small
        self.inputs, self.hidden = inputs, hidden
        self.skimmed = skimmed
        self.every_step, self.detached = every_step, detached
        self._pair = isinstance(big, nn.LSTMCell)  # kept, as a session replaces cells by engines
        self._packed = PackedCells()
        scorer = nn.Linear(inputs + hidden, 1)
        nn.init.constant_(scorer.bias, reading)
        self.gate = Gate(scorer, rule if rule is not None else StraightThrough())

    @property
    def runs_whole(self) -> bool:
        """Whether all steps are one native call, so that engines for parts would gain nothing."""
        return self._native() is not None

    def forward(self, x: Tensor | Sequences) -> Tensor:
        """The state (h of an LSTM) after the last step of each row; with `every_step`, after every step.

        Args:
            x: (B, T, inputs), or `Sequences` of them.

        Returns:
            (B, hidden), or (B, T, hidden), where the last state of a row is repeated after its end.

        Raises:
            InputError: another shape, no step, or impossible lengths.
        """
        x_BTD, lengths = as_sequences(x, self.inputs)
        ready = self._native() if self.gathers and self.force is None and fit(x_BTD) else None
        if ready is not None:
            return self._natively(x_BTD, lengths, ready)
        state = zero_state(x_BTD, x_BTD.shape[0], self.hidden, pair=self._pair)
        zeros = over_tensors(torch.zeros_like, state)
        states = []
        for t in range(x_BTD.shape[1]):
            step = (x_BTD[:, t], state)
            seen = hidden_of(state).detach() if self.detached else hidden_of(state)
            reads, score = self.gate(torch.cat([step[0], seen], 1))
            present = (t < lengths).to(score.dtype)[:, None]
            keep = self.tap(Decision(torch.cat([reads, 1 - reads], 1), score), present=present).keep
            read = self.run(0, self._read, keep[:, 0], step, otherwise=zeros)
            skimmed = self.run(1, self._skim, keep[:, 1], step, otherwise=zeros)
            stays = 1 - keep.sum(1, keepdim=True)
            # A sum, so that gradients of the choice are those of reads * f + (1 - reads) * f'.
            state = over_tensors(lambda a, b, old, stays=stays: a + b + stays * old, read, skimmed, state)
            if self.every_step:
                states.append(hidden_of(state))
        return torch.stack(states, 1) if self.every_step else hidden_of(state)

    def _native(self) -> Ready | None:
        """The weights for the native kernel, if it can run this layer."""
        cells = [self.big, self.small]
        sizes = [(getattr(cell, "input_size", 0), getattr(cell, "hidden_size", 0)) for cell in cells]
        expected = [(self.inputs, self.hidden), (self.inputs + self.hidden - self.skimmed, self.skimmed)]
        gate = self.gate
        if type(gate) is not Gate or not isinstance(gate.rule, BinaryRule) or sizes != expected:
            return None
        return self._packed.of(cells, gate.scorer, around=[gate, gate.rule])

    def _natively(self, x_BTD: Tensor, lengths: Tensor, ready: Ready) -> Tensor:
        """`forward` in one call, in which rows run at their own pace, so that each cell runs for many at once."""
        assert isinstance(self.gate.rule, BinaryRule)
        threshold = float(self.gate.rule.at)
        answer, reads, score = skim(
            x_BTD, lengths, ready, skimmed=self.skimmed, threshold=threshold, every_step=self.every_step
        )
        for t in range(x_BTD.shape[1] if self.trace is not None else 0):
            present = (t < lengths).to(reads.dtype)[:, None]
            read = reads[:, t : t + 1]
            self.log(Decision(torch.cat([read, present - read], 1), score[:, t : t + 1]))
        return answer

    def _read(self, given: tuple[Tensor, Any]) -> Any:
        return self.big(*given)

    def _skim(self, given: tuple[Tensor, Any]) -> Any:
        x, state = given
        head = over_tensors(lambda t: t[:, : self.skimmed], state)
        head = self.small(torch.cat([x, hidden_of(state)[:, self.skimmed :]], 1), head)
        return over_tensors(lambda new, old: torch.cat([new, old[:, self.skimmed :]], 1), head, state)


@dataclass(frozen=True)
class SkimCost(Objective):
    """Minus the log-probability of skimming, averaged over the steps of a batch, summed over the Skim layers.

    The second term of the paper's loss, weighted with its gamma: `CrossEntropy() + 0.01 * SkimCost()`.
    `train.BudgetPenalty` limits the MACs of both cells instead.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """The cost of the scores in the trace. Padding does not count.

        Raises:
            StructureError: no Skim layer that ran, or one that only some rows reached.
        """
        costs = []
        for name in dict.fromkeys(call.name for call in trace.decisions(Skim)):
            calls = trace.complete(name)
            scores = torch.cat([call.decision.score for call in calls])
            present = torch.cat([call.keep.detach() for call in calls]).sum(1, keepdim=True)
            costs.append((functional.softplus(scores) * present).sum() / present.sum().clamp(min=1))
        return torch.stack(costs).sum()
