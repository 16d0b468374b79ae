"""REINFORCE over a trace: sampled decisions that were followed by a high reward become more likely.

    objective = CrossEntropy() + Reinforce(SkipReward(0.1))

Gates sample with the rule `Bernoulli`, whose keep carries no gradient; the objective reads the log-probability of the
decisions from the trace. Williams 1992, doi:10.1007/BF00992696.
"""

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import Dynamic, evaluating, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.trace import Call, Trace
from dynanet.gates.rules import Bernoulli, Gumbel, Sigmoid, StraightThrough


class Reward(ABC):
    """The reward of a sampled pass, for every sample.

    No gradient flows through it. Its repr names all its settings, as that of an `Objective` does.
    """

    @abstractmethod
    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """(B,); or (B, calls), what followed from each decision of `sampled(trace)`, in their order."""


@dataclass(frozen=True)
class SkipReward(Reward):
    """-CE + alpha * the share of units skipped from a decision on (SkipNet, arXiv:1711.09485, eq. 3-5).

    Args:
        alpha: what skipping everything is worth, in nats of cross-entropy.

    Raises:
        ConfigError: a negative alpha.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ConfigError(f"alpha must be at least 0, got {self.alpha}, which would punish skipping")

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """(B, calls): a decision is credited with the units skipped from it on, not before."""
        calls = sampled(trace)
        skipped = torch.stack([(1 - call.keep.detach()).flatten(1).mean(1) for call in calls], 1) / len(calls)
        to_come = skipped.flip(1).cumsum(1).flip(1)
        return self.alpha * to_come - _cross_entropy(answer, y)[:, None]


@dataclass(frozen=True)
class DropReward(Reward):
    """1 - (share of units kept)^2 where the answer is right, -penalty where it is wrong (arXiv:1711.08393, eq. 2).

    Args:
        penalty: the paper's gamma: the larger, the less is dropped. The authors published 5 and 10.

    Raises:
        ConfigError: a negative penalty.
    """

    penalty: float

    def __post_init__(self) -> None:
        if not self.penalty >= 0:
            raise ConfigError(f"penalty must be at least 0, got {self.penalty}, which would reward mistakes")

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """The reward of every sample, (B,)."""
        kept = torch.cat([call.keep.detach().flatten(1) for call in sampled(trace)], 1).mean(1)
        right = answer.detach().argmax(1) == y
        return torch.where(right, 1 - kept.square(), torch.full_like(kept, -self.penalty))


@dataclass(frozen=True)
class CostReward(Reward):
    """-CE - weight * MACs spent, as a share of the full model's: units weigh what they cost.

    Args:
        weight: what the full model's MACs are worth, in nats of cross-entropy.
        cost: of this model.

    Raises:
        ConfigError: a negative weight.
    """

    weight: float
    cost: CostModel = field(repr=False)
    full: float = field(init=False)

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ConfigError(f"weight must be at least 0, got {self.weight}, which would reward spending")
        object.__setattr__(self, "full", self.cost.full)

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """The reward of every sample, (B,)."""
        spent = (self.cost.spent(trace).detach() / self.full).to(answer.dtype)
        return -_cross_entropy(answer, y) - self.weight * spent


@dataclass(frozen=True)
class Reinforce(Objective):
    """-log(probability of the decisions) * advantage; the gradient is that of the expected reward, negated.

    The advantage is the reward less the mean reward of the *other* samples of the batch: a baseline that does not
    depend on the sample's own decisions, so the gradient stays unbiased and has less variance. For another baseline use
    `surrogate`. In eval mode (validation), where nothing is sampled, the loss is 0.

    Args:
        reward: of a pass.
        entropy: weight of the decisions' mean entropy in nats, which encourages exploration.
    """

    reward: Reward
    _: KW_ONLY
    entropy: float = 0.0

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """A scalar to differentiate; its value is not a measure of progress.

        Raises:
            StructureError: no gate has the rule Bernoulli.
        """
        calls = sampled(trace)
        if not calls:
            raise StructureError(
                f"nothing was sampled: none of the layers {sorted(trace.names.values())} decided by the rule "
                f"Bernoulli; give gates that rule, for example with train.sample_gates(model)"
            )
        if not any(layer.training for layer in trace.names if _samples(layer)):
            return calls[0].decision.score.new_zeros(())
        reward = self.reward(answer, y, trace)
        rows = reward.shape[0]
        advantage = (reward - reward.mean(0)) * (rows / (rows - 1)) if rows > 1 else reward
        loss = surrogate(trace, advantage)
        if self.entropy:
            loss = loss - self.entropy * torch.stack([_entropy(call.decision.score) for call in calls]).mean()
        return loss


def surrogate(trace: Trace, advantage: Tensor) -> Tensor:
    """-log p * advantage, summed over the decisions of a sample and averaged over the batch.

    Args:
        trace: of a pass in train mode.
        advantage: (B,), or (B, calls) in the order of `sampled(trace)`; taken as a constant.
    """
    log_p = torch.stack([_log_prob(call) for call in sampled(trace)], 1)
    advantage = advantage.detach().to(log_p.dtype)
    return -(log_p * (advantage if advantage.dim() == 2 else advantage[:, None])).sum(1).mean()


def sampled(trace: Trace) -> list[Call]:
    """The decisions of layers whose own gate has the rule `Bernoulli`; sampled in train mode, cut at 0 in eval mode.

    Decisions that a row never reached are included: they do not change its reward, so they add noise to the gradient
    and no bias.
    """
    names = {name for layer, name in trace.names.items() if _samples(layer)}
    return [call for call in trace.calls if call.name in names]


def sample_gates(model: nn.Module) -> nn.Module:
    """Replace every differentiable rule by `Bernoulli`, to go from a warm-up with soft gates to REINFORCE.

    Decisions in eval mode do not change where scores were cut at 0. (SkipNet's two stages, arXiv:1711.09485, 3.3.)

    Returns:
        The model, changed in place.

    Raises:
        StructureError: no gate has such a rule.
    """
    gates = [
        m for m in model.modules() if isinstance(m, Gate) and isinstance(m.rule, Sigmoid | StraightThrough | Gumbel)
    ]
    if not gates:
        raise StructureError(
            "no gate of this model has a differentiable rule to replace: Sigmoid, StraightThrough or Gumbel"
        )
    for gate in gates:
        gate.rule = Bernoulli().train(gate.training)
    return model


@torch.no_grad()
def deployed_reward(model: nn.Module, x: Any, y: Any, reward: Reward) -> Tensor:
    """The reward of the decisions in eval mode: the self-critical baseline.

    Rennie et al. 2017, arXiv:1612.00563; in BlockDrop the policy cut at 1/2. It takes a second pass, so `surrogate`
    fits a loop of your own.

        advantage = reward(answer, y, trace) - deployed_reward(model, x, y, reward)
        loss = surrogate(trace, advantage)

    Args:
        model: its train and eval modes are restored.
        x: the batch.
        y: its labels.
        reward: as for the sampled pass.

    Raises:
        StructureError: no gate with the rule Bernoulli.
    """
    rules = [m for m in model.modules() if isinstance(m, Bernoulli)]
    if not rules:
        raise StructureError("no gate of this model samples; give gates the rule Bernoulli")
    with evaluating(model), record(model) as trace:
        answer = model(x)
        return reward(answer, y, trace)


def _samples(module: nn.Module) -> bool:
    """Whether the module's own gate has the rule Bernoulli; gates of dynamic layers inside it do not count."""
    return any(
        isinstance(child, Bernoulli) or (not isinstance(child, Dynamic) and _samples(child))
        for child in module.children()
    )


def _log_prob(call: Call) -> Tensor:
    """The log-probability of all that one call decided about a sample, (B,). Rows of a sample are contiguous."""
    keep, score = call.decision
    if score.shape != keep.shape:
        raise StructureError(
            f"{call.name!r} scores {score.shape[-1]} units and decides on {keep.shape[-1]}, so its decisions have no "
            f"log-probability; train it with a differentiable rule"
        )
    log_p = Bernoulli.log_prob(score, keep)
    return log_p.reshape(call.keep.shape[0], -1).sum(1)


def _entropy(score: Tensor) -> Tensor:
    """The mean entropy of Bernoulli variables with these log-odds."""
    p = score.sigmoid()
    return -(p * functional.logsigmoid(score) + (1 - p) * functional.logsigmoid(-score)).mean()


def _cross_entropy(answer: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(answer.detach(), y, reduction="none")
