"""Mixture-of-Depths: a block of a transformer runs only for the tokens that matter most; others skip it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.decision import Decision
from dynanet.core.errors import StructureError, check_shares
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.ops.tokens import TOKEN_ROWS, TokenLayer, Tokens, rank


class MixtureOfDepths(TokenLayer):
    """x + keep * r * (block(x) - x), with keep for the tokens of the highest router weights r.

    Raposo et al. 2024, arXiv:2404.02258, equation 1. Whether a token is kept depends on the other tokens of its
    sequence, later ones included (**sequence-coupled**), so a causal model cannot decide this way while it generates.
    With a `predictor` (section 3.5 of the paper) training is the same, and eval mode is **causal**: a token runs where
    the predictor, which sees that token alone, expects it to be among the highest. `PredictTopTokens` trains it.

    Tokens that run attend to each other only, so a block's attention must read which tokens are there
    (`ops.tokens.attend`, or `ops.tokens.attend_causal` in a causal model).

    Args:
        block: Tokens to Tokens of the same layout, its shortcuts included.
        width: features of a token.
        capacity: the share of a sequence's tokens that run in training, rounded up; the paper's best is 1/8.
        predictor: from token features (..., D) to the log-odds of being kept, (..., 1); `causal_predictor` makes one.
            None: top tokens in eval mode too.

    Raises:
        ConfigError: a capacity outside (0, 1].
    """

    def __init__(
        self, block: nn.Module, width: int, *, capacity: float = 0.125, predictor: nn.Module | None = None
    ) -> None:
        super().__init__()
        check_shares(positive=True, capacity=capacity)
        self.block = block
        self.capacity = capacity
        self.predictor = predictor
        self.router = nn.Linear(width, 1, bias=False)

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens to Tokens of the same layout; a token that is not kept is unchanged."""
        weight = self.router(tokens.x)
        keep = self.tap(self._decide(tokens, weight), present=tokens.present).keep[..., 0]
        inside = tokens if self.gathers else tokens._replace(alive=keep)
        x = self.run(0, self._weighted, keep, (inside, weight), otherwise=tokens.x, rows=TOKEN_ROWS)
        return tokens._replace(x=x)

    def _decide(self, tokens: Tokens, weight: Tensor) -> Decision:
        """Decide by the score of eval mode: the predictor's log-odds if there is one, else the router's weight."""
        score = weight if self.predictor is None else self.predictor(tokens.x.detach())
        if tokens.alive is not None:
            score = score.masked_fill(tokens.alive[..., None] <= 0, torch.finfo(score.dtype).min)
        if self.predictor is not None and not self.training:
            return Decision((score > 0).to(score.dtype), score)
        below, count = rank(weight[..., 0].detach(), tokens)
        kept = (count * self.capacity).ceil()
        return Decision((below >= count - kept).to(weight.dtype)[..., None], score)

    def _weighted(self, inside: tuple[Tokens, Tensor]) -> Tensor:
        tokens, weight = inside
        return tokens.x + weight * (self.block(tokens).x - tokens.x)


def causal_predictor(width: int, hidden: int = 32) -> nn.Module:
    """A small network on a token's features; (width + 1) * hidden MACs per token."""
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))


@dataclass(frozen=True)
class PredictTopTokens(Objective):
    """Trains the predictors: binary cross-entropy with whether a token was among the highest (the paper's section 3.5).

    `CrossEntropy() + 1.0 * PredictTopTokens()`; its gradient reaches the predictors only.
    """

    def __call__(self, answer: object, y: object, trace: Trace) -> Tensor:
        """Averaged over the tokens that are there, over all layers with a predictor.

        Raises:
            StructureError: no such layer decided.
        """
        found = trace.all(MixtureOfDepths)
        losses = []
        for call in trace.decisions(MixtureOfDepths):
            if found[call.name].predictor is not None:
                there = call.decision.score > torch.finfo(call.decision.score.dtype).min / 2
                score = call.decision.score[there]
                kept = call.decision.keep.detach()[there]
                losses.append(functional.binary_cross_entropy_with_logits(score, kept))
        if not losses:
            raise StructureError(f"expected a MixtureOfDepths with a predictor; none of {sorted(found)} has one")
        return torch.stack(losses).mean()
