"""Token drop: tokens leave a transformer; the blocks after it see only those that stay."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.ops.tokens import (
    TOKEN_ROWS,
    Rectangle,
    Tokens,
    attention_price,
    rank,
    spread_rows,
    sum_by_sample,
)


class TokenDrop(Dynamic):
    """The unit is the rest: blocks that run for the kept tokens only, and may drop again.

    DynamicViT (Rao et al. 2021, arXiv:2106.02034) with counts that may differ from sample to sample; EViT (Liang et al.
    2022, arXiv:2202.07800) with `fuse` and a share of the tokens most attended to. Around a single block it is
    Mixture-of-Depths (arXiv:2404.02258) with a threshold instead of a capacity. The first token of every sample (CLS)
    always stays.

    Args:
        rest: maps Tokens to Tokens.
        gate: maps token features (..., D) to a Decision with keep (..., 1); maps Tokens where a `TokenScorer` is in it.
        fuse: what a sample drops becomes one token more: the mean weighted with the attention of the class token. It
            goes on in the place of the dropped token most attended to, which the trace therefore calls kept.
    """

    degree = 2  # attention among n tokens costs a n + b n^2

    def __init__(self, rest: nn.Module, gate: nn.Module, *, fuse: bool = False) -> None:
        super().__init__()
        self.rest, self.gate, self.fuse = rest, gate, fuse

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens to Tokens of the same layout; a dropped token comes out as it went in.

        Raises:
            StructureError: with `fuse`, tokens that do not know the attention of the class token.
        """
        sees_others = any(isinstance(m, TokenScorer) for m in self.gate.modules())  # gates may be replaced
        own: Decision = self.gate(tokens if sees_others else tokens.x)
        own = own._replace(keep=own.keep.to(tokens.x.dtype))
        present = None if tokens.alive is None else tokens.alive[..., None]
        decision = self.apply_override(own, pinned=tokens.first()[..., None], present=present)
        inside = tokens._replace(attention=None, key=None)
        if self.fuse:
            host, fused = _fused(tokens, decision.keep[..., 0])
            decision = decision._replace(keep=torch.maximum(decision.keep, host[..., None]))
            inside = inside._replace(x=torch.where(host[..., None] > 0, fused, tokens.x))
        self.log(decision)
        keep = decision.keep[..., 0]
        inside = inside if self.gathers else inside._replace(alive=keep)
        x = self.run(0, lambda t: self.rest(t).x, keep, inside, otherwise=tokens.x, rows=TOKEN_ROWS)
        return tokens._replace(x=x)

    def price(self, keep: Tensor, unit_macs: Tensor) -> Tensor:
        """a n + b n^2 with n the kept tokens of a sample; both measured."""
        return attention_price(keep, unit_macs)


class TokenScorer(nn.Module, ABC):
    """Scores tokens by what the others of their sample are, too: it is handed Tokens instead of features."""

    @abstractmethod
    def forward(self, tokens: Tokens) -> Tensor:
        """(B, T, 1), or (N, 1) when the tokens are packed."""


class TokenPredictor(TokenScorer):
    """DynamicViT's prediction module (arXiv:2106.02034, section 3.2): half of what it reads is a token's own, half is
    the mean over the sample's tokens that are there. One logit instead of two probabilities: their log-odds.

    Args:
        width: features D of a token, a multiple of 4.
        bias: of the last layer at the start. Positive: tokens are kept at first.

    Raises:
        ConfigError: a width that 4 does not divide.
    """

    def __init__(self, width: int, bias: float = 2.0) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ConfigError(f"a prediction module for tokens of {width} features; expected a multiple of 4")
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        last = nn.Linear(width // 4, 1)
        nn.init.constant_(last.bias, bias)
        self.decide = nn.Sequential(
            *(nn.Linear(width, width // 2), nn.GELU()), *(nn.Linear(width // 2, width // 4), nn.GELU()), last
        )

    def forward(self, tokens: Tokens) -> Tensor:
        """Logits; above 0 means keep."""
        own, shown = self.read(tokens.x).chunk(2, -1)
        weight = torch.ones_like(tokens.x[..., :1]) if tokens.alive is None else tokens.alive[..., None].to(own.dtype)
        count = sum_by_sample(weight, tokens).clamp(min=1)
        mean = spread_rows(sum_by_sample(shown * weight, tokens) / count, tokens)
        return self.decide(torch.cat([own, mean.expand_as(own)], -1))


class ClassAttention(TokenScorer):
    """How much the class token attended to each token in the block before: EViT's attentiveness, no parameters.

    The block writes it into the tokens (`class_attention`).
    """

    def forward(self, tokens: Tokens) -> Tensor:
        """Between 0 and 1, summing to 1 over a sample.

        Raises:
            StructureError: tokens that do not know it.
        """
        return _attention(tokens)[..., None]


class RankScorer(TokenScorer):
    """Another score as a rank: the share of a sample's tokens that score lower.

    `Threshold(0.3)` then keeps 0.7 of them, to the nearest whole number (a half goes), whatever the scores: as EViT
    does always, and DynamicViT at inference.

    The first token, which always stays, is not counted.

    Args:
        scorer: of tokens, or of features (..., D).
    """

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, tokens: Tokens) -> Tensor:
        """Between 0 and 1, in float32 or finer: bfloat16 could not tell hundreds of ranks apart."""
        score = self.scorer(tokens if isinstance(self.scorer, TokenScorer) else tokens.x)[..., 0]
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        ranks, count = rank(torch.where(tokens.first() > 0, torch.inf, score), tokens)
        return ((ranks + 0.5) / (count - 1).clamp(min=1)).to(score.dtype)[..., None]


class TokenRatio(Objective):
    """The mean over samples and dropping layers of (kept share - wanted share)^2.

    Rao et al. 2021 (DynamicViT, arXiv:2106.02034, section 3.4), the ratio loss.

    Shares are of all tokens but the first. Shares of later layers are of all tokens too, so a layer that keeps 0.7 of
    what 0.7 was kept of has 0.49.

    Args:
        shares: one for every TokenDrop, in the order of the model.
        per_sample: every sample is pulled to the share, as in the paper; otherwise the batch's mean is, and samples may
            differ as they like.

    Raises:
        ConfigError: a share outside [0, 1].
    """

    def __init__(self, shares: Sequence[float], *, per_sample: bool = True) -> None:
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise ConfigError(f"token ratios of {tuple(shares)}; give a share between 0 and 1 for every layer")
        self.shares, self.per_sample = tuple(shares), per_sample

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the keeps in the trace.

        Raises:
            StructureError: another number of dropping layers than shares.
        """
        names = [name for layer, name in trace.names.items() if isinstance(layer, TokenDrop)]
        if len(names) != len(self.shares):
            raise StructureError(f"token ratios for {len(self.shares)} layers; this model drops tokens in {names}")
        misses = []
        for name, wanted in zip(names, self.shares, strict=True):
            keep = torch.stack(trace[name]).mean(0)[:, 1:, 0]  # (B, T - 1)
            kept = keep.mean(1) if self.per_sample else keep.mean()
            misses.append((kept - wanted).square().mean())
        return torch.stack(misses).mean()

    def __repr__(self) -> str:
        return f"TokenRatio({self.shares}, per_sample={self.per_sample})"


class WithTeacher(Dynamic):
    """A student with its teacher: in training the trace hears what the teacher answers; otherwise it is the student.

    Both are networks with `features`, images to Tokens with all blocks done, and `classify`, Tokens to logits, as the
    token networks of the zoo are. The teacher is no part of the module: its weights are neither trained nor saved.

    Args:
        student: with TokenDrop layers inside.
        teacher: trained, without them, of the same width.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        vars(self)["teacher"] = teacher

    def forward(self, x: Tensor) -> Tensor:
        """The student's logits."""
        if not self.training or self.trace is None:
            return self.student(x)
        teacher = vars(self)["teacher"].eval()
        with torch.no_grad():
            tokens = teacher.features(x)
            self.trace.log_answer(self, (teacher.classify(tokens), tokens.x))
        tokens = self.student.features(x)
        self.trace.log_answer(self, (None, tokens.x))
        return self.student.classify(tokens)


class TokenDistillation(Objective):
    """What DynamicViT learns from its teacher (arXiv:2106.02034, section 3.4): KL(teacher || answer), and the mean
    squared distance of the tokens that every layer kept. For a `WithTeacher` model.

    Args:
        logits: weight of the divergence.
        tokens: weight of the distance.
    """

    def __init__(self, logits: float = 0.5, tokens: float = 0.5) -> None:
        self.logits, self.tokens = logits, tokens

    def __call__(self, answer: Tensor, y: Any, trace: Trace) -> Tensor:
        """Over what the trace heard; 0 in eval mode, in which the teacher is not asked.

        Raises:
            StructureError: the model is not `WithTeacher`.
        """
        found = [(layer, name) for layer, name in trace.names.items() if isinstance(layer, WithTeacher)]
        if len(found) != 1:
            raise StructureError(
                f"distillation needs one WithTeacher model and found {len(found)}; wrap the student with its teacher"
            )
        if not found[0][0].training:
            return answer.new_zeros(())
        (wanted, theirs), (_, ours) = trace.answers[found[0][1]]
        divergence = functional.kl_div(
            answer.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
        )
        names = [name for layer, name in trace.names.items() if isinstance(layer, TokenDrop)]
        stayed = torch.stack([trace[name][-1] for name in names]).amin(0).detach()  # (B, T, 1)
        distance = ((ours - theirs).square().mean(-1, keepdim=True) * stayed).sum() / stayed.sum().clamp(min=1)
        return self.logits * divergence + self.tokens * distance

    def __repr__(self) -> str:
        return f"TokenDistillation({self.logits:g}, {self.tokens:g})"


def _attention(tokens: Tokens) -> Tensor:
    if tokens.attention is None:
        raise StructureError(
            "these tokens do not know how much the class token attends to them; let the attention before write "
            "`attention=class_attention(query, key, tokens, heads)` into them"
        )
    return tokens.attention


def _fused(tokens: Tokens, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Where the fused token goes, 1 or 0 shaped as keep; and what it is, spread over its sample's tokens."""
    alive = torch.ones_like(keep) if tokens.alive is None else tokens.alive
    weight = _attention(tokens) * alive * (1 - keep)
    total = sum_by_sample(weight, tokens).clamp(min=torch.finfo(weight.dtype).tiny)
    fused = sum_by_sample(weight[..., None] * tokens.x, tokens) / total[:, None]
    rectangle = Rectangle(tokens)
    dropped = rectangle.of((alive * (1 - keep)).detach(), fill=0.0) > 0
    best = torch.where(dropped, rectangle.of(_attention(tokens).detach(), fill=0.0), -1.0)
    host = torch.zeros_like(best)
    if best.shape[1]:
        host = host.scatter(1, best.argmax(1, keepdim=True), 1.0) * dropped
    return rectangle.rows(host).to(keep.dtype), spread_rows(fused, tokens)
