"""Early exit: classifiers along a staged backbone; a row leaves at the first one with enough confidence."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.halt import ThresholdHalt
from dynanet.core.macs import CountMacs
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.gates.confidence import Confidence, MaxProbability


class EarlyExit(ThresholdHalt):
    """Intermediate classifiers on any staged backbone (BranchyNet, arXiv:1709.01686; MSDNet, arXiv:1703.09844).

    In training every exit answers, for multi-exit objectives; the answer is that of the last. In eval mode a row goes
    on past step k while its confidence is below the threshold of the exit. A new model never exits early (thresholds
    are infinite); `calibrate.calibrate` finds thresholds for a budget. To set one by hand, in log-odds for the default
    confidence: `model.thresholds.fill_(MaxProbability.from_probability(0.9))`.

    Args:
        stages: stage k maps the state of stage k - 1 to its own; the first takes the input. A state is any pytree of
            tensors whose first axis is the batch.
        exits: exit k maps the state of stage k to logits (B, classes).
        confidence: scores logits; `PerExit` for a criterion per exit. None for `MaxProbability`.

    Raises:
        StructureError: no stages, not one exit per stage, or a confidence that does not score every exit but the last.
    """

    multi_exit = True

    def __init__(
        self, stages: Sequence[nn.Module], exits: Sequence[nn.Module], confidence: Confidence | None = None
    ) -> None:
        if len(stages) != len(exits) or not stages:
            raise StructureError(f"early exit needs one exit per stage; got {len(stages)} stages, {len(exits)} exits")
        super().__init__(len(exits), confidence if confidence is not None else MaxProbability())
        self.stages = nn.ModuleList(stages)
        self.exits = nn.ModuleList(exits)
        self._active = tuple(range(len(stages)))

    @property
    def active(self) -> tuple[int, ...]:
        """The exits that answer, counted from 0. Set it to switch the others off.

        The classifier of an exit that is switched off is not computed. There is one step per active exit. The answers
        of active exits stay the same; calibrate again, as costs fall. Thresholds of exits that are switched off become
        infinite. A state dict does not say which exits are on, and loads in either case.

        Raises:
            StructureError: on setting, numbers that do not ascend, are not exits, or lack the last one.
        """
        return self._active

    @active.setter
    def active(self, exits: Sequence[int]) -> None:
        """Switch exits on, and the others off."""
        given = tuple(exits)
        last = len(self.exits) - 1
        if given != tuple(sorted(set(given))) or not given or given[0] < 0 or given[-1] != last:
            raise StructureError(
                f"active is {given}; expected ascending numbers of exits from 0 to {last}, the last included"
            )
        self._active = given
        self.steps = len(given)
        off = [k for k in range(last) if k not in given]
        with torch.no_grad():
            self.thresholds[off] = torch.inf

    def exit_of(self, k: int) -> int:
        """The number of active exit k."""
        return self._active[k]

    def start(self, x: Any) -> Any:
        """The input, and no memory of earlier exits."""
        return x, None

    def step(self, k: int, state: Any) -> tuple[Any, Tensor]:
        """Run the stages up to active exit k, and that exit."""
        features, memory = state
        number = self._active[k]
        for i in range(self._active[k - 1] + 1 if k else 0, number + 1):
            features = self.stages[i](features)
        logits = self.exits[number](features)
        if k + 1 < self.steps:
            memory = self.confidence.at(number).remember(logits, memory)
        return (features, memory), logits

    def score(self, k: int, state: Any, answer: Tensor) -> Tensor:
        """The confidence (B, 1) of active exit k."""
        return self.confidence.at(self._active[k])(answer, state[1])

    @torch.no_grad()
    def exit_macs(self, x: Any) -> list[float]:
        """MACs per sample of the classifier and confidence of every exit: what switching it off saves.

        Args:
            x: an input of this layer, one sample or more.

        Returns:
            One number per exit, the last included.
        """
        model = copy.deepcopy(self).eval()
        model.active = tuple(range(len(self.exits)))
        samples = tree_leaves(x)[0].shape[0]
        macs = []
        state = model.start(x)
        for k in range(model.steps):
            features = model.stages[k](state[0])
            with CountMacs() as count:
                logits = model.exits[k](features)
                memory = state[1]
                if k + 1 < model.steps:
                    memory = model.confidence.at(k).remember(logits, memory)
                    model.score(k, (features, memory), logits)
            macs.append(count.total / samples)
            state = (features, memory)
        return macs


@dataclass(frozen=True)
class JointGates(Objective):
    """Trains learned gates together with the classifiers (JEI-DNN: Regol et al. 2023, arXiv:2310.09163).

    The best exit of a sample has the least cross-entropy plus weight * cost. Every gate learns whether the best exit is
    this one or an earlier one, and the classifiers learn the cross-entropy of each exit, weighted with the probability
    that the gates let a sample leave there. The paper alternates the two; here each step does both, with no gradient
    between them. For a model in training mode.

    Args:
        macs: (exits,) of a sample that leaves at each exit, rising; `CostModel.steps` measures them.
        weight: cost of the last exit, in nats of cross-entropy.
        halt: name of the EarlyExit; None where only one answered.

    Raises:
        ConfigError: costs that do not rise, or a negative weight.
    """

    macs: Sequence[float]
    weight: float
    halt: str | None = None

    def __post_init__(self) -> None:
        macs = list(self.macs)
        if not macs or macs[0] < 0 or macs != sorted(macs) or macs[-1] <= 0:
            raise ConfigError(f"macs is {macs}; expected the MACs at every exit, rising to above 0")
        if not self.weight >= 0:
            raise ConfigError(f"weight must be at least 0, got {self.weight}; it is the last exit's cost in nats")

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """The loss of the logits (B, C) and the scores of the gates in the trace, with labels y (B,).

        Raises:
            StructureError: no exits in the trace, several layers and none named, not one cost per exit, or exits that
                only some rows reached.
        """
        exits = trace.exits(y.shape[0], self.halt)
        name = next(iter(trace.answers)) if self.halt is None else self.halt
        if len(exits) != len(self.macs):
            raise StructureError(
                f"{len(exits)} exits answered and macs has {len(self.macs)}; use train mode, and give one cost per exit"
            )
        losses = torch.stack([functional.cross_entropy(e, y, reduction="none") for e in exits], 1)
        scores = [call.decision.score for call in trace.complete(name)]
        if not scores:
            return losses.mean()
        gates = torch.cat(scores, 1)
        cost = losses.new_tensor(self.macs) / self.macs[-1]
        best = (losses.detach() + self.weight * cost).argmin(1, keepdim=True)
        here = (best <= torch.arange(len(scores), device=best.device)).to(gates.dtype)
        gate_loss = functional.binary_cross_entropy_with_logits(gates, here)
        return (_leaving(gates.detach()) * losses).sum(1).mean() + gate_loss


def _leaving(gates: Tensor) -> Tensor:
    """The probability (B, exits) to leave at each exit, from the log-odds (B, exits - 1) of leaving once there."""
    leave = torch.cat([gates.sigmoid(), torch.ones_like(gates[:, :1])], 1)
    arrive = torch.cat([torch.ones_like(gates[:, :1]), (-gates).sigmoid().cumprod(1)], 1)
    return leave * arrive
