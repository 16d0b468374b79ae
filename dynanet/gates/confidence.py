"""Confidence criteria: how sure an answer is. Higher is surer.

The field thresholds the maximum of the softmax. In float32 that is exactly 1.0 for most answers of a good network, and
a threshold cannot split ties. These scores keep the order on a scale that does not saturate. Thresholds are therefore
log-odds; `MaxProbability.from_probability` converts a probability.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.confidence import Confidence
from dynanet.core.errors import StructureError


class MaxProbability(Confidence):
    """Log-odds of the most probable class: log(p / (1 - p)), computed without rounding p.

    The same order as the maximum of the softmax (MSDNet: Huang et al. 2018, arXiv:1703.09844). To exit at a probability
    of 0.9, set a threshold of `MaxProbability.from_probability(0.9)`.
    """

    def forward(self, logits: Tensor, memory: Any = None) -> Tensor:
        """Scores (rows, 1): z_max - logsumexp(the other logits)."""
        return _log_odds(logits)

    @staticmethod
    def from_probability(p: float) -> float:
        """The score of a probability, for thresholds that are given as probabilities."""
        return torch.tensor(p, dtype=torch.float64).logit().item()


class Entropy(Confidence):
    """Minus the logarithm of the softmax's entropy (BranchyNet: Teerapittayanon et al. 2016, arXiv:1709.01686)."""

    def forward(self, logits: Tensor, memory: Any = None) -> Tensor:
        """Scores (rows, 1): -log H, where H is summed in logarithms over exp(log p + log(-log p))."""
        log_p = logits.log_softmax(-1)
        log_p = torch.where(log_p.isneginf(), torch.finfo(log_p.dtype).min, log_p)
        # -log p of the top class underflows long before the others do; from the log-odds s it is softplus(-s),
        # and the logarithm of that is -s - e^-s / 2 + O(e^-2s).
        odds = _log_odds(logits)
        far = odds.clamp(min=15)
        near = odds.clamp(max=15)
        top = torch.where(odds > 15, -far - (-far).exp() / 2, nn.functional.softplus(-near).log())
        terms = log_p + torch.where(log_p == log_p.amax(-1, keepdim=True), top, (-log_p).clamp(min=1e-30).log())
        return -terms.logsumexp(-1, keepdim=True)


class Margin(Confidence):
    """The best logit minus the second best: the logarithm of the ratio of the two largest probabilities."""

    def forward(self, logits: Tensor, memory: Any = None) -> Tensor:
        """Scores (rows, 1): log p1 - log p2."""
        _several(logits)
        best = logits.topk(2, dim=-1).values
        return best[..., :1] - best[..., 1:]


class Patience(Confidence):
    """How many consecutive exits before this one gave the same answer (PABEE: Zhou et al. 2020, arXiv:2006.04152).

    A threshold of p exits once p exits in a row have agreed with the one before them.
    """

    def remember(self, logits: Tensor, memory: Any) -> tuple[Tensor, Tensor]:
        """The answer, and how many consecutive exits agreed with the one before, (rows, 1) each."""
        answer = logits.argmax(-1, keepdim=True)
        if memory is None:
            return answer, torch.zeros_like(answer)
        before, times = memory
        return answer, torch.where(answer == before, times + 1, torch.zeros_like(times))

    def forward(self, logits: Tensor, memory: Any = None) -> Tensor:
        """The count, (rows, 1)."""
        assert memory is not None, "Patience scores what `remember` answered"
        return memory[1].to(logits.dtype)


class PerExit(Confidence):
    """A confidence per exit, for example learned ones, which `calibrate.learned_exits` fits.

    Args:
        exits: one per exit except the last, which always answers.
    """

    def __init__(self, exits: Sequence[Confidence]) -> None:
        super().__init__()
        self.exits = nn.ModuleList(exits)

    def at(self, k: int) -> Confidence:
        """The confidence of exit k.

        Raises:
            StructureError: k is not an exit before the last.
        """
        if not 0 <= k < len(self.exits):
            raise StructureError(f"no confidence for exit {k}, only {len(self.exits)}; give one per exit but the last")
        found = self.exits[k]
        assert isinstance(found, Confidence)
        return found

    def forward(self, logits: Tensor, memory: Any = None) -> Tensor:
        """Not defined, as the criterion depends on the exit; use `at`.

        Raises:
            StructureError: always.
        """
        raise StructureError("this confidence depends on the exit; score exit k with confidence.at(k)")


class LearnedGate(Confidence):
    """A linear gate on four measures of uncertainty; its score is the log-odds that leaving here is best.

    JEI-DNN's gate (Regol et al. 2023, arXiv:2310.09163): the greatest probability, the entropy, the entropy at another
    temperature, and the margin, on the scales of this file. A new one scores as `MaxProbability` does. Logits are
    detached, as the gate's loss must not make the classifiers less confident.
    """

    measures = 4

    def __init__(self) -> None:
        super().__init__()
        self.linear = _as_max_probability(self.measures)

    def features(self, logits: Tensor, memory: Any = None) -> Tensor:
        """The measures of uncertainty, (rows, 4)."""
        return _uncertainties(logits.detach())

    def forward(self, logits: Tensor, memory: Any = None) -> Tensor:
        """Log-odds (rows, 1) that leaving is best."""
        return self.linear(self.features(logits))


class LearnedScore(Confidence):
    """The log-odds that the answer is right, from uncertainty, the class probabilities and the exit before.

    EENet's score function (Ilhan et al. 2023, arXiv:2301.07099): a linear map of the class probabilities, the measures
    of uncertainty, the agreement with the exit before, and that exit's score. A new one scores as `MaxProbability`.

    Args:
        classes: width of the logits.
    """

    measures = 6

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = _as_max_probability(self.measures + classes)

    def features(self, logits: Tensor, memory: Any = None) -> Tensor:
        """Uncertainties, agreement, the score before, and probabilities, (rows, 6 + classes)."""
        logits = logits.detach()
        answer = logits.argmax(-1, keepdim=True)
        if memory is None:
            agrees = before = torch.zeros_like(logits[..., :1])
        else:
            agrees = (answer == memory[0]).to(logits.dtype)
            before = memory[1].detach()
        return torch.cat([_uncertainties(logits), agrees, before, logits.softmax(-1)], -1)

    def remember(self, logits: Tensor, memory: Any) -> tuple[Tensor, Tensor]:
        """The answer and its score, (rows, 1) each."""
        return logits.argmax(-1, keepdim=True), self.linear(self.features(logits, memory))

    def forward(self, logits: Tensor, memory: Any = None) -> Tensor:
        """Log-odds (rows, 1) that the answer is right."""
        assert memory is not None, "LearnedScore scores what `remember` answered"
        return memory[1]


def _uncertainties(logits: Tensor) -> Tensor:
    """Log-odds, minus log entropy, margin, and minus log entropy at temperature 2, (rows, 4)."""
    entropy = Entropy()
    return torch.cat([_log_odds(logits), entropy(logits), Margin()(logits), entropy(logits / 2)], -1)


def _as_max_probability(features: int) -> nn.Linear:
    """A linear map that returns its first feature, the log-odds."""
    linear = nn.Linear(features, 1)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    nn.init.ones_(linear.weight[:, 0])
    return linear


def _log_odds(logits: Tensor) -> Tensor:
    _several(logits)
    top, where = logits.max(-1, keepdim=True)
    others = logits.scatter(-1, where, -torch.inf)
    return top - others.logsumexp(-1, keepdim=True)


def _several(logits: Tensor) -> None:
    if logits.shape[-1] < 2:
        raise StructureError(
            f"confidence needs at least 2 logits, got {logits.shape[-1]}; give a logit per class, two for yes and no"
        )
