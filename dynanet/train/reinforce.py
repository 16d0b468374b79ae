"""REINFORCE over a trace: sampled decisions that were followed by a good reward become likelier.

    objective = CrossEntropy() + Reinforce(SkipReward(0.1))

Gates sample with the rule `Bernoulli`, whose keep carries no gradient; the objective reads the log-probability of what
was decided from the trace. Williams 1992, doi:10.1007/BF00992696.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import Dynamic, record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.core.objective import Objective
from dynanet.core.trace import Call, Trace
from dynanet.gates.rules import Bernoulli, Gumbel, Sigmoid, StraightThrough


class Reward(ABC):
    """What a sampled pass was worth, sample by sample. No gradient flows through it. Its repr tells its settings."""

    @abstractmethod
    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """(B,); or (B, calls), what followed from each of the decisions `sampled(trace)`, in their order."""


class SkipReward(Reward):
    """-CE + alpha * the share of units skipped from a decision on (SkipNet, arXiv:1711.09485, eq. 3-5).

    Args:
        alpha: what skipping everything is worth, in nats of cross-entropy.

    Raises:
        ConfigError: a negative alpha.
    """

    def __init__(self, alpha: float) -> None:
        if not alpha >= 0:
            raise ConfigError(f"SkipReward got alpha = {alpha}, which would punish skipping; give 0 or more")
        self.alpha = alpha

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """(B, calls): a decision is not credited with what was skipped before it."""
        calls = sampled(trace)
        skipped = torch.stack([(1 - call.keep.detach()).flatten(1).mean(1) for call in calls], 1) / len(calls)
        to_come = skipped.flip(1).cumsum(1).flip(1)
        return self.alpha * to_come - _cross_entropy(answer, y)[:, None]

    def __repr__(self) -> str:
        return f"SkipReward({self.alpha:g})"


class DropReward(Reward):
    """1 - (share of units kept)^2 where the answer is right, -penalty where it is wrong (arXiv:1711.08393, eq. 2).

    Args:
        penalty: the paper's gamma: the larger, the less is dropped. The authors published 5 and 10.

    Raises:
        ConfigError: a negative penalty, which would praise mistakes.
    """

    def __init__(self, penalty: float) -> None:
        if not penalty >= 0:
            raise ConfigError(
                f"DropReward takes the penalty of a wrong answer as a number of at least 0; got {penalty}"
            )
        self.penalty = penalty

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """(B,)."""
        kept = torch.cat([call.keep.detach().flatten(1) for call in sampled(trace)], 1).mean(1)
        right = answer.detach().argmax(1) == y
        return torch.where(right, 1 - kept.square(), torch.full_like(kept, -self.penalty))

    def __repr__(self) -> str:
        return f"DropReward({self.penalty:g})"


class CostReward(Reward):
    """-CE - weight * MACs spent, as a share of the full model's: units weigh what they cost.

    Args:
        weight: what the full model's MACs are worth, in nats of cross-entropy.
        cost: of this model.

    Raises:
        ConfigError: a negative weight.
    """

    def __init__(self, weight: float, cost: CostModel) -> None:
        if not weight >= 0:
            raise ConfigError(f"CostReward got weight = {weight}, which would praise spending; give 0 or more")
        self.weight, self.cost = weight, cost

    def __call__(self, answer: Tensor, y: Tensor, trace: Trace) -> Tensor:
        """(B,)."""
        spent = (self.cost.spent(trace).detach() / self.cost.full).to(answer.dtype)
        return -_cross_entropy(answer, y) - self.weight * spent

    def __repr__(self) -> str:
        return f"CostReward({self.weight:g}, full={self.cost.full:.0f})"


class Reinforce(Objective):
    """-log(probability of the decisions) * advantage; the gradient is that of the expected reward, negated.

    The advantage is the reward less the mean reward of the *other* samples of the batch: a baseline that depends on no
    decision of the sample itself, so the gradient keeps its expectation and loses most of its noise. For a baseline of
    another kind take `surrogate`.

    Where nothing is sampled because the model is in eval mode (validation), it is 0.

    Args:
        reward: of a pass.
        entropy: weight of the decisions' mean entropy, which keeps them from settling early (nats).
    """

    def __init__(self, reward: Reward, *, entropy: float = 0.0) -> None:
        self.reward, self.entropy = reward, entropy

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """A scalar whose value means little and whose gradient is the point.

        Raises:
            StructureError: no gate samples.
        """
        calls = sampled(trace)
        if not calls:
            raise StructureError(
                f"nothing was sampled: no layer of {sorted(trace.names.values())} decided by the rule Bernoulli; give "
                f"gates that rule, say with train.sample_gates(model)"
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

    def __repr__(self) -> str:
        return f"Reinforce({self.reward!r}, entropy={self.entropy:g})"


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

    Decisions that a row never arrived at count too: they earn it nothing, so they add noise to a gradient and no error.
    """
    names = {name for layer, name in trace.names.items() if _samples(layer)}
    return [call for call in trace.calls if call.name in names]


def sample_gates(model: nn.Module) -> nn.Module:
    """From a warm-up with soft gates to reinforcement: every gate with a differentiable rule gets `Bernoulli`.

    In eval mode nothing changes where scores were cut at 0. (SkipNet's two stages, arXiv:1711.09485, section 3.3.)

    Returns:
        The model, changed in place.

    Raises:
        StructureError: no such gate.
    """
    gates = [
        m for m in model.modules() if isinstance(m, Gate) and isinstance(m.rule, Sigmoid | StraightThrough | Gumbel)
    ]
    if not gates:
        raise StructureError(
            "no gate of this model has a differentiable rule to be replaced: Sigmoid, StraightThrough or Gumbel"
        )
    for gate in gates:
        gate.rule = Bernoulli().train(gate.training)
    return model


@torch.no_grad()
def deployed_reward(model: nn.Module, x: Any, y: Any, reward: Reward) -> Tensor:
    """The reward of the model as it decides in eval mode: the self-critical baseline (Rennie et al. 2017,
    arXiv:1612.00563; in BlockDrop the policy cut at 1/2).

        advantage = reward(answer, y, trace) - deployed_reward(model, x, y, reward)
        loss = surrogate(trace, advantage)

    Args:
        model: its modes are left as they were. A second pass, so `surrogate` fits a loop of your own.
        x: the batch.
        y: its labels.
        reward: as for the sampled pass.

    Raises:
        StructureError: no gate with the rule Bernoulli.
    """
    rules = [m for m in model.modules() if isinstance(m, Bernoulli)]
    if not rules:
        raise StructureError("no gate of this model samples; give gates the rule Bernoulli")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with record(model) as trace:
            answer = model(x)
        return reward(answer, y, trace)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _samples(module: nn.Module) -> bool:
    """A rule Bernoulli that is the layer's own: not one of a layer inside it."""
    return any(
        isinstance(child, Bernoulli) or (not isinstance(child, Dynamic) and _samples(child))
        for child in module.children()
    )


def _log_prob(call: Call) -> Tensor:
    """(B,): of everything that one call decided about a sample. Rows of a sample lie together, in any layout."""
    keep, score = call.decision
    if score.shape != keep.shape:
        raise StructureError(
            f"{call.name!r} scores {score.shape[-1]} units and decides on {keep.shape[-1]}, so its decisions have no "
            f"probability to reinforce; train it with a differentiable rule"
        )
    log_p = Bernoulli.log_prob(score, keep)
    return log_p.reshape(call.keep.shape[0], -1).sum(1)


def _entropy(score: Tensor) -> Tensor:
    """Of a Bernoulli variable with these log-odds, averaged."""
    p = score.sigmoid()
    return -(p * functional.logsigmoid(score) + (1 - p) * functional.logsigmoid(-score)).mean()


def _cross_entropy(answer: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(answer.detach(), y, reduction="none")
