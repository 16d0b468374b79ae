"""Token halting: every token runs through as many blocks as it needs, and is absent from later ones."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.decision import Decision
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.ops.halting import halting_calls, halting_scores, ponder_cost
from dynanet.ops.tokens import TOKEN_ROWS, TokenLayer, Tokens, first_rows


class TokenHalting(TokenLayer):
    """A-ViT (Yin et al. 2022, arXiv:2112.07658, section 3): adaptive computation time for the tokens of a transformer.

    After block n a token has the halting score h_n = sigmoid(scale x_n[0] + shift), read off the first entry of its own
    features. It stops at the first block N at which its scores sum to 1 - eps or more, the last block if none does, and
    later blocks do not attend to it. Its answer is the mean of its states weighted with the scores, the last with the
    remainder R = 1 - (h_1 + ... + h_{N-1}). The class token, the first of a sample, runs through all blocks.

    Unit k is block k + 1; the first block runs for every token. `TokenPonderCost` and `HaltingDepth` are the loss terms
    that make tokens stop.

    Args:
        blocks: each maps Tokens to Tokens.
        eps: how far below 1 a sum may stop.
        scale: of the first entry, initially; learned, one for all blocks.
        shift: initially; learned, one for all blocks. The more negative, the longer tokens stay at first.
        first_only: return the class token alone, (B, 1, D), for a classifier: the states of other tokens are not
            averaged, which saves a few per cent of the time.

    Attributes:
        halting: x (..., D) to halting logits (...,).

    Raises:
        StructureError: no blocks.
        ConfigError: eps outside (0, 1).
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        eps: float = 0.01,
        scale: float = 5.0,
        shift: float = -3.0,
        first_only: bool = False,
    ) -> None:
        super().__init__()
        if not blocks:
            raise StructureError("token halting needs at least one block, got none")
        if not 0 < eps < 1:
            raise ConfigError(f"eps must be between 0 and 1 (0.01 in ACT), got eps = {eps}")
        self.blocks = nn.ModuleList(blocks)
        self.eps = eps
        self.first_only = first_only
        self.halting = FirstEntry(scale, shift)

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens to Tokens of the same layout, each the mean of its states; or a rectangle of the first of each."""
        whole = tokens
        mean = _Mean(first_only=self.first_only)
        total = torch.zeros_like(tokens.x[..., 0])
        last = len(self.blocks) - 1
        # Frames nest: block k + 1 sees the rows that were kept of those that block k saw.
        with ExitStack() as frames:
            for k, block in enumerate(self.blocks):
                tokens = block(tokens)
                alive = tokens.membership()
                if k == last:
                    mean.add(alive * (1 - total), tokens)
                    break
                h = self.halting(tokens.x).sigmoid()
                score = (total + h)[..., None]
                own = Decision((score < 1 - self.eps).to(score.dtype), score)
                pinned = tokens.first()[..., None]
                keep = self.tap(own, first=k, pinned=pinned, present=tokens.present).keep[..., 0]
                h = torch.minimum(h, 1 - total)  # otherwise weights under a forced keep could sum to more than 1
                weight = alive * torch.where(keep > 0, h, 1 - total)
                mean.add(weight, tokens)
                kept = self.kept(keep, TOKEN_ROWS)
                frames.enter_context(self.within(kept.frame(self, k)))
                if kept.empty:
                    break
                tokens = tokens._replace(attention=None, key=None)
                if kept.index is None:
                    tokens = tokens._replace(alive=keep)
                tokens, total = kept.take((tokens, total + weight))
                mean.follow(kept.index, of=keep.numel())
        return Tokens(mean.answer()[:, None]) if self.first_only else whole._replace(x=mean.answer())


class FirstEntry(nn.Module):
    """The halting logit of a token: scale times its first feature plus shift, both learned."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (...,)."""
        return self.scale * x[..., 0] + self.shift


@dataclass(frozen=True)
class TokenPonderCost(Objective):
    """N + R, the blocks and the remainder of a token: the mean over all tokens but the first, summed over the layers.

    The ponder loss of Yin et al. 2022 (A-ViT, arXiv:2112.07658, section 3). Its gradient is -1 for every halting score
    before the last.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the halting scores in the trace.

        Raises:
            StructureError: no layer that halts tokens, or one that ran several times or for some tokens only.
        """
        return torch.stack([ponder_cost(*halting) for halting in _halting(trace)]).sum()


@dataclass(frozen=True)
class HaltingDepth(Objective):
    """KL(H || normal around a depth): how halting scores are to be spread over the blocks.

    The distributional prior of Yin et al. 2022 (A-ViT, arXiv:2112.07658, section 3). H is every block's mean halting
    score over all tokens but the first, as shares of their sum.

    Args:
        depth: the block, counted from 1, at which tokens should stop.
        spread: standard deviation of the normal, in blocks.

    Raises:
        ConfigError: a depth below 1, or a spread that is not positive.
    """

    depth: float
    spread: float = 1.0

    def __post_init__(self) -> None:
        if self.depth < 1 or not self.spread > 0:
            raise ConfigError(
                f"depth must be at least 1 and spread above 0, got depth = {self.depth} and spread = {self.spread}"
            )

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the halting scores in the trace.

        Raises:
            StructureError: as `TokenPonderCost`; or a layer of one block, after which no token halts.
        """
        divergences = []
        for keeps, scores in _halting(trace):
            if not keeps:
                raise StructureError("HaltingDepth needs layers of at least two blocks: after the last no token halts")
            reached = [torch.ones_like(keeps[0]), *keeps[:-1]]
            p = torch.stack([(r.detach() * h).mean() for r, h in zip(reached, scores, strict=True)])
            p = (p / p.sum()).clamp(min=torch.finfo(p.dtype).tiny)
            blocks = torch.arange(1, len(scores) + 1, device=p.device, dtype=p.dtype)
            wanted = (-((blocks - self.depth) / self.spread).square() / 2).log_softmax(0)
            divergences.append(functional.kl_div(wanted, p.log(), reduction="sum", log_target=True))
        return torch.stack(divergences).sum()


def blocks_taken(trace: Trace, name: str | None = None) -> Tensor:
    """N, how many blocks every token ran through, (B, T): for maps of the computation.

    Args:
        trace: of one pass.
        name: of the TokenHalting; None where the model has only one.

    Raises:
        StructureError: no such layer, several and none named, or one that did not run.
    """
    return 1 + trace.runs(trace.one(TokenHalting, name)[1], unit=None).long()


class _Mean:
    """The weighted sum of states; in the sparse form it is updated in place, at the rows that are still there."""

    def __init__(self, *, first_only: bool) -> None:
        self._first_only = first_only
        self._sum: Tensor | None = None
        self._index: Tensor | None = None

    def add(self, weight: Tensor, tokens: Tokens) -> None:
        x = tokens.x
        if self._first_only:
            weight, x = first_rows(weight, tokens), first_rows(x, tokens)
        more = weight[..., None] * x
        if self._sum is None:
            self._sum = more
        elif self._index is None:
            self._sum = self._sum + more.view_as(self._sum)
        else:
            self._sum = self._sum.flatten(0, -2).index_add_(0, self._index, more).view_as(self._sum)

    def follow(self, index: Tensor | None, *, of: int) -> None:
        """Later tokens are the rows at `index` of the present ones, whose number is `of`."""
        if self._first_only or index is None or index.numel() == of:
            return
        self._index = index if self._index is None else self._index.index_select(0, index)

    def answer(self) -> Tensor:
        assert self._sum is not None
        return self._sum


def _halting(trace: Trace) -> list[tuple[list[Tensor], list[Tensor]]]:
    """By TokenHalting, the keeps and the halting scores after every block but the last, of all tokens but the first."""
    found = []
    for name in trace.all(TokenHalting):
        calls = halting_calls(trace, name)
        keeps = [call.keep for call in calls]
        scores = [h.reshape(keep.shape) for h, keep in zip(halting_scores(calls), keeps, strict=True)]  # may be packed
        found.append(([keep[:, 1:] for keep in keeps], [h[:, 1:] for h in scores]))
    return found
