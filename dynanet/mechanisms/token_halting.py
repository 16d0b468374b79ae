"""Token halting: every token goes through as many blocks as it needs, and is gone for the others afterwards."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.objective import Objective
from dynanet.core.trace import Call, Trace
from dynanet.ops.tokens import TOKEN_ROWS, Tokens, attention_price, first_rows


class TokenHalting(Dynamic):
    """A-ViT (Yin et al. 2022, arXiv:2112.07658, section 3): adaptive computation time for the tokens of a transformer.

    After block n a token has the halting score h_n = sigmoid(scale x_n[0] + shift), read off the first entry of its own
    features. It stops at the first block N at which its scores sum to 1 - eps or more, the last block if none does, and
    nobody attends to it any longer. Its answer is the mean of its states weighted with the scores, the last with the
    remainder R = 1 - (h_1 + ... + h_{N-1}). The class token, the first of a sample, goes through all blocks.

    Unit k is block k + 1; the first block runs for every token. `TokenPonderCost` and `HaltingDepth` are the terms of
    the loss that make tokens stop.

    Args:
        blocks: each maps Tokens to Tokens.
        eps: how far below 1 a sum may stop.
        scale: of the first entry, at the start; learned, one for all blocks.
        shift: at the start; learned, one for all blocks. The more negative, the longer tokens stay at first.
        first_only: answer the class token alone, (B, 1, D), as a classifier asks for: the states of the others are not
            summed up, which is a few per cent of the time.

    Attributes:
        halting: x (..., D) to halting logits (...,).

    Raises:
        StructureError: no blocks.
        ConfigError: eps outside (0, 1).
    """

    degree = 2  # attention among n tokens costs a n + b n^2

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
            raise StructureError("token halting needs at least one block")
        if not 0 < eps < 1:
            raise ConfigError(f"token halting got eps = {eps}; give a number between 0 and 1, 0.01 as in ACT")
        self.blocks, self.eps, self.first_only = nn.ModuleList(blocks), eps, first_only
        self.halting = FirstEntry(scale, shift)

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens to Tokens of the same layout, each the mean of its states; or a rectangle of the first of each."""
        whole, mean = tokens, _Mean(first_only=self.first_only)
        total, last = torch.zeros_like(tokens.x[..., 0]), len(self.blocks) - 1
        with ExitStack() as frames:
            for k, block in enumerate(self.blocks):
                tokens = block(tokens)
                alive = torch.ones_like(total) if tokens.alive is None else tokens.alive
                if k == last:
                    mean.add(alive * (1 - total), tokens)
                    break
                h = self.halting(tokens.x).sigmoid()
                score = (total + h)[..., None]
                own = Decision((score < 1 - self.eps).to(score.dtype), score)
                present = None if tokens.alive is None else alive[..., None]
                keep = self.tap(own, first=k, pinned=tokens.first()[..., None], present=present).keep[..., 0]
                h = torch.minimum(h, 1 - total)  # a token that is made to stay spends no more than 1
                weight = alive * torch.where(keep > 0, h, 1 - total)
                mean.add(weight, tokens)
                kept = self.kept(keep, TOKEN_ROWS)
                frames.enter_context(self.within(kept.frame(self, k)))
                if kept.empty:
                    break
                tokens = tokens._replace(attention=None, key=None)
                tokens = tokens._replace(alive=keep) if kept.index is None else tokens
                tokens, total = kept.take((tokens, total + weight))
                mean.follow(kept.index, of=keep.numel())
        return Tokens(mean.answer()[:, None]) if self.first_only else whole._replace(x=mean.answer())

    def price(self, keep: Tensor, unit_macs: Tensor) -> Tensor:
        """a n + b n^2 of every block, with n the tokens that go through it; all measured."""
        return attention_price(keep, unit_macs)


class FirstEntry(nn.Module):
    """The halting logit of a token: scale times its first feature plus shift, both learned."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(shift))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (...,)."""
        return self.scale * x[..., 0] + self.shift


class TokenPonderCost(Objective):
    """N + R, the blocks and the remainder of a token: the mean over all tokens but the first, summed over the layers.

    The ponder loss of Yin et al. 2022 (A-ViT, arXiv:2112.07658, section 3). Its gradient is -1 for every halting score
    before the last.
    """

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the halting scores in the trace.

        Raises:
            StructureError: no layer that halts tokens, or tokens that were not computed: use train mode.
        """
        costs = []
        for calls in _halting(trace):
            cost = torch.full((), 2.0)
            for call, h in zip(calls, _scores(calls), strict=True):
                cost = cost + (call.keep.detach() * (1 - h))[:, 1:].mean()
            costs.append(cost)
        return torch.stack(costs).sum()

    def __repr__(self) -> str:
        return "TokenPonderCost()"


class HaltingDepth(Objective):
    """KL(H || normal around a depth): how the halting scores are to be spread over the blocks.

    The distributional prior of Yin et al. 2022 (A-ViT, arXiv:2112.07658, section 3). H is every block's mean halting
    score over all tokens but the first, as shares of their sum.

    Args:
        depth: the block, counted from 1, at which tokens should stop.
        spread: standard deviation of the normal, in blocks.

    Raises:
        ConfigError: a depth below 1, or a spread that is not positive.
    """

    def __init__(self, depth: float, spread: float = 1.0) -> None:
        if depth < 1 or not spread > 0:
            raise ConfigError(f"halting around block {depth} with a spread of {spread}; give 1 or more, and above 0")
        self.depth, self.spread = depth, spread

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the halting scores in the trace.

        Raises:
            StructureError: as `TokenPonderCost`.
        """
        divergences = []
        for calls in _halting(trace):
            if not calls:
                raise StructureError("a halting depth for one block, after which no token halts; leave it out")
            reached = [torch.ones_like(calls[0].keep), *(call.keep for call in calls[:-1])]
            means = [(r.detach() * h)[:, 1:].mean() for r, h in zip(reached, _scores(calls), strict=True)]
            p = torch.stack(means)
            p = (p / p.sum()).clamp(min=torch.finfo(p.dtype).tiny)
            blocks = torch.arange(1, len(calls) + 1, device=p.device, dtype=p.dtype)
            wanted = (-((blocks - self.depth) / self.spread).square() / 2).log_softmax(0)
            divergences.append(functional.kl_div(wanted, p.log(), reduction="sum", log_target=True))
        return torch.stack(divergences).sum()

    def __repr__(self) -> str:
        return f"HaltingDepth({self.depth:g}, {self.spread:g})"


def blocks_taken(trace: Trace, name: str = "") -> Tensor:
    """N, how many blocks every token went through, (B, T): for pictures of where the compute went.

    Args:
        trace: of one pass.
        name: the TokenHalting's name.

    Raises:
        StructureError: the layer of that name decided nothing in this trace.
    """
    if name not in trace.keys():
        raise StructureError(f"{name!r} decided nothing in this trace; the layers heard are {trace.keys()}")
    return 1 + torch.stack(trace[name]).sum(0)[..., 0].long()


class _Mean:
    """The weighted sum of states: in place and at the rows that are still there in the sparse form."""

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
        """From now on tokens are these rows of the `of` that they were."""
        if self._first_only or index is None or index.numel() == of:
            return
        self._index = index if self._index is None else self._index.index_select(0, index)

    def answer(self) -> Tensor:
        assert self._sum is not None
        return self._sum


def _halting(trace: Trace) -> list[list[Call]]:
    """The decisions of one pass through every TokenHalting."""
    found = [name for layer, name in trace.names.items() if isinstance(layer, TokenHalting)]
    if not found:
        raise StructureError(f"a cost of halting needs TokenHalting, and the layers are {sorted(trace.names.values())}")
    passes = []
    for name in found:
        calls = [call for call in trace.calls if call.name == name]
        shapes = {call.decision.score.shape for call in calls} | {call.keep.shape for call in calls}
        if len(shapes) > 1 or len({call.first for call in calls}) < len(calls):
            raise StructureError(
                f"the loss of {name!r} needs one pass in which every token was computed; this trace has {len(calls)} "
                f"decisions of shapes {sorted(map(tuple, shapes))}: use train mode or the dense form, and call it once"
            )
        passes.append(calls)
    return passes


def _scores(calls: list[Call]) -> list[Tensor]:
    """h after every block but the last, for the tokens that reached it."""
    sums = [call.decision.score for call in calls]
    return [now if k == 0 else now - sums[k - 1] for k, now in enumerate(sums)]
