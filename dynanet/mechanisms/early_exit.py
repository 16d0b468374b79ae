"""Early exit: classifiers along a staged backbone; a row leaves at the first one that is sure enough."""

import copy
from collections.abc import Sequence
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

    In training every exit answers, for multi-exit objectives; the answer is the last one's. In eval mode a row goes on
    past step k while its confidence is below the exit's threshold. A new model never exits early (thresholds are
    infinite); `calibrate.calibrate` finds thresholds for a budget.

    Args:
        stages: stage k maps the state of stage k - 1 to its own; the first takes the input. A state is any pytree of
            tensors whose first axis is the batch.
        exits: exit k maps stage k's state to logits (B, classes).
        confidence: how sure logits are; `PerExit` for another criterion at every exit.

    Attributes:
        thresholds: (exits - 1,), in the units of `confidence`. +inf: nobody leaves here; -inf: everybody.
        leaves: (steps - 1,) int64, which of the thresholds each step has; `calibrate.calibrate` reads it.

    Raises:
        StructureError: no stages, not one exit per stage, or a confidence that does not speak of every exit.
    """

    def __init__(
        self, stages: Sequence[nn.Module], exits: Sequence[nn.Module], confidence: Confidence | None = None
    ) -> None:
        if len(stages) != len(exits) or not stages:
            raise StructureError(f"early exit needs one exit per stage; got {len(stages)} stages, {len(exits)} exits")
        super().__init__(len(exits), confidence if confidence is not None else MaxProbability())
        self.stages, self.exits = nn.ModuleList(stages), nn.ModuleList(exits)
        self.leaves: Tensor
        self.register_buffer("leaves", torch.arange(len(stages) - 1), persistent=False)
        self._active = tuple(range(len(stages)))

    @property
    def active(self) -> tuple[int, ...]:
        """The exits that answer, counted from 0. Set it to switch the others off.

        The classifier of an exit that is switched off is not computed: samples that go on do not pay for it. There is
        one step per active exit. What the others answer stays as it is; calibrate again, as prices fell. Thresholds of
        exits that are switched off become infinite. A state dict does not tell which exits are on, and loads either
        way.

        Raises:
            StructureError: on setting, numbers that do not ascend, are no exits, or lack the last one.
        """
        return self._active

    @active.setter
    def active(self, exits: Sequence[int]) -> None:
        given, last = tuple(exits), len(self.exits) - 1
        if given != tuple(sorted(set(given))) or not given or given[0] < 0 or given[-1] != last:
            raise StructureError(
                f"active is {given}; expected ascending numbers of exits from 0 to {last}, the last included"
            )
        self._active, self.steps = given, len(given)
        off = [k for k in range(last) if k not in given]
        with torch.no_grad():
            self.thresholds[off] = torch.inf
        self.leaves = torch.tensor(given[:-1], dtype=torch.int64, device=self.thresholds.device)

    def exit_of(self, k: int) -> int:
        """Active exit k."""
        return self._active[k]

    def start(self, x: Any) -> Any:
        """The input, and no memory of earlier exits."""
        return x, None

    def step(self, k: int, state: Any) -> tuple[Any, Tensor]:
        """The stages up to active exit k, and that exit."""
        features, memory = state
        number = self._active[k]
        for i in range(self._active[k - 1] + 1 if k else 0, number + 1):
            features = self.stages[i](features)
        logits = self.exits[number](features)
        if k + 1 < self.steps:
            memory = self.confidence.at(number).remember(logits, memory)
        return (features, memory), logits

    def score(self, k: int, state: Any, answer: Tensor) -> Tensor:
        """The confidence of active exit k."""
        return self.confidence.at(self._active[k])(answer, state[1])

    @torch.no_grad()
    def exit_macs(self, x: Any) -> list[float]:
        """MACs per sample of every exit's own classifier and confidence, the last included: what switching it off
        saves.

        Args:
            x: an input of this layer, one sample or more.
        """
        model = copy.deepcopy(self).eval()
        model.active = range(len(self.exits))
        samples, macs, state = tree_leaves(x)[0].shape[0], [], model.start(x)
        for k in range(model.steps):
            features = model.stages[k](state[0])
            with CountMacs() as count:
                logits, memory = model.exits[k](features), state[1]
                if k + 1 < model.steps:
                    memory = model.confidence.at(k).remember(logits, memory)
                    model.score(k, (features, memory), logits)
            macs.append(count.total / samples)
            state = (features, memory)
        return macs


class JointGates(Objective):
    """Trains learned gates together with the classifiers: a term(answer, y, trace) for a model in training mode.

    JEI-DNN (Regol et al. 2023, arXiv:2310.09163): a sample's best exit is that of the least cross-entropy
    plus weight * cost; every gate learns to tell whether it lies here or earlier, and the classifiers learn the
    cross-entropy of each exit weighted with the chance that the gates let a sample out there. The paper alternates the
    two; here each step does both, with no gradient between them.

    Args:
        macs: (exits,) of a sample that leaves at each exit, rising; `CostModel.steps` measures them.
        weight: what the dearest exit may cost in nats of cross-entropy.
        halt: the name of the EarlyExit; None where the model has only one.

    Raises:
        ConfigError: costs that do not rise, or a negative weight.
    """

    def __init__(self, macs: Sequence[float], weight: float, halt: str | None = None) -> None:
        self.macs, self.weight, self.halt = tuple(float(m) for m in macs), weight, halt
        if not self.macs or self.macs[0] < 0 or list(self.macs) != sorted(self.macs) or self.macs[-1] <= 0:
            raise ConfigError(f"macs is {self.macs}; expected the MACs at every exit, rising to above 0")
        if not weight >= 0:
            raise ConfigError(f"weight is {weight}; expected nats of cross-entropy for the dearest exit, 0 or more")

    def __call__(self, answer: Any, y: Tensor, trace: Trace) -> Tensor:
        """Over the logits (B, C) and the gates' scores in the trace.

        Raises:
            StructureError: no exits in the trace, several layers and none named, other exits than costs, or exits that
                only some rows reached.
        """
        name = self.halt if self.halt is not None else next(iter(trace.answers), None)
        if name not in trace.answers or (self.halt is None and len(trace.answers) > 1):
            raise StructureError(f"exits of {sorted(trace.answers)} answered; name one of these as `halt`")
        exits = trace.answers[name]
        scores = [call.decision.score for call in trace.calls if call.name == name]
        if len(exits) != len(self.macs) or any(e.shape[0] != y.shape[0] for e in exits):
            raise StructureError(
                f"{len(exits)} exits answered {[e.shape[0] for e in exits]} of {y.shape[0]} rows; expected all rows at "
                f"{len(self.macs)} exits: use train mode, and one cost per exit"
            )
        losses = torch.stack([functional.cross_entropy(e, y, reduction="none") for e in exits], 1)
        if not scores:
            return losses.mean()
        gates = torch.cat(scores, 1)
        cost = losses.new_tensor(self.macs) / self.macs[-1]
        best = (losses.detach() + self.weight * cost).argmin(1, keepdim=True)
        here = (best <= torch.arange(len(scores), device=best.device)).to(gates.dtype)
        return (_leaving(gates.detach()) * losses).sum(1).mean() + functional.binary_cross_entropy_with_logits(
            gates, here
        )

    def __repr__(self) -> str:
        return f"JointGates({self.macs}, weight={self.weight:g}, halt={self.halt!r})"


def _leaving(gates: Tensor) -> Tensor:
    """(B, exits): the chance to leave at each exit, from the log-odds (B, exits - 1) of leaving once there."""
    leave = torch.cat([gates.sigmoid(), torch.ones_like(gates[:, :1])], 1)
    arrive = torch.cat([torch.ones_like(gates[:, :1]), (-gates).sigmoid().cumprod(1)], 1)
    return leave * arrive
