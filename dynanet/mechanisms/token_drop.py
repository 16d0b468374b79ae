"""Token drop: tokens leave a transformer; the blocks after it see only those that stay. First form."""

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.ops.tokens import TOKEN_ROWS, Tokens


class TokenDrop(Dynamic):
    """The unit is the rest: blocks that run for the kept tokens only, and may drop again.

    DynamicViT (Rao et al. 2021, arXiv:2106.02034) with counts that may differ from sample to sample. Around a single
    block it is Mixture-of-Depths (arXiv:2404.02258) with a threshold instead of a capacity. The first token of every
    sample (CLS) always stays.

    Args:
        rest: maps Tokens to Tokens.
        gate: maps token features (..., D) to a Decision with keep (..., 1).
    """

    degree = 2  # attention among n tokens costs a n + b n^2

    def __init__(self, rest: nn.Module, gate: nn.Module):
        super().__init__()
        self.rest, self.gate = rest, gate

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens to Tokens of the same layout; a dropped token comes out as it went in."""
        decision: Decision = self.gate(tokens.x)
        present = None if tokens.alive is None else tokens.alive[..., None]
        keep = self.tap(_and_first(decision, tokens), pinned=tokens.first()[..., None], present=present).keep[..., 0]
        inside = tokens if self.gathers else tokens._replace(alive=keep)
        x = self.run(0, lambda t: self.rest(t).x, keep, inside, otherwise=tokens.x, rows=TOKEN_ROWS)
        return tokens._replace(x=x)

    def price(self, keep: Tensor, unit_macs: Tensor) -> Tensor:
        """a n + b n^2 with n the kept tokens of a sample; both measured."""
        n = keep.to(unit_macs).flatten(1).sum(1)
        return n * unit_macs[0, 0] + n * n * unit_macs[0, 1]


def _and_first(decision: Decision, tokens: Tokens) -> Decision:
    return Decision(torch.maximum(decision.keep, tokens.first()[..., None]), decision.score)
