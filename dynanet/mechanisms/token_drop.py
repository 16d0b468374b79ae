"""Token drop: tokens are removed from a transformer, and later blocks see only those that stay."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError, check_shares
from dynanet.core.objective import Objective
from dynanet.core.trace import Trace
from dynanet.ops.tokens import TOKEN_ROWS, Rectangle, TokenLayer, Tokens, rank, spread_rows, sum_by_sample


class TokenDrop(TokenLayer):
    """Runs the rest of a network, the unit, for the kept tokens only; it may drop again.

    DynamicViT (Rao et al. 2021, arXiv:2106.02034) with counts that may differ from sample to sample; EViT (Liang et al.
    2022, arXiv:2202.07800) with `fuse` and a share of the tokens most attended to. Around a single block it is
    Mixture-of-Depths (arXiv:2404.02258) with a threshold instead of a capacity. The first token of every sample (CLS)
    always stays.

    Args:
        rest: maps Tokens to Tokens.
        gate: maps token features (..., D) to a Decision with keep (..., 1); maps Tokens if it contains a `TokenScorer`.
        fuse: add one token, the mean of the dropped ones weighted with the attention of the class token. It takes the
            place of the dropped token most attended to, which is therefore kept in the trace.
    """

    def __init__(self, rest: nn.Module, gate: nn.Module, *, fuse: bool = False) -> None:
        super().__init__()
        self.rest = rest
        self.gate = gate
        self.fuse = fuse

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens to Tokens of the same layout; a dropped token is unchanged.

        Raises:
            StructureError: with `fuse`, tokens without the attention of the class token.
        """
        sees_others = any(isinstance(m, TokenScorer) for m in self.gate.modules())  # the gate may be replaced
        own: Decision = self.gate(tokens if sees_others else tokens.x)
        own = own._replace(keep=own.keep.to(tokens.x.dtype))
        decision = self.apply_override(own, pinned=tokens.first()[..., None], present=tokens.present)
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


class TokenScorer(nn.Module, ABC):
    """Scores a token by the other tokens of its sample too: its input is Tokens instead of features."""

    @abstractmethod
    def forward(self, tokens: Tokens) -> Tensor:
        """(B, T, 1), or (N, 1) when the tokens are packed."""


class TokenPredictor(TokenScorer):
    """DynamicViT's prediction module (arXiv:2106.02034, section 3.2).

    Half of its features are the token's own, half the mean over the sample's tokens that are there. One logit instead
    of two probabilities: their log-odds.

    Args:
        width: features D of a token, a multiple of 4.
        bias: initial bias of the last layer. Positive: tokens are kept at first.

    Raises:
        ConfigError: a width that 4 does not divide.
    """

    def __init__(self, width: int, bias: float = 2.0) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ConfigError(f"width must be a multiple of 4, got {width}")
        self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        last = nn.Linear(width // 4, 1)
        nn.init.constant_(last.bias, bias)
        self.decide = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(), last
        )

    def forward(self, tokens: Tokens) -> Tensor:
        """Logits; above 0 means keep."""
        own, shown = self.read(tokens.x).chunk(2, -1)
        weight = torch.ones_like(tokens.x[..., :1]) if tokens.alive is None else tokens.alive[..., None].to(own.dtype)
        count = sum_by_sample(weight, tokens).clamp(min=1)
        mean = spread_rows(sum_by_sample(shown * weight, tokens) / count, tokens)
        return self.decide(torch.cat([own, mean.expand_as(own)], -1))


class ClassAttention(TokenScorer):
    """The attention of the class token to each token in the block before (EViT's attentiveness); no parameters.

    The block writes it into the tokens (`class_attention`).
    """

    def forward(self, tokens: Tokens) -> Tensor:
        """Between 0 and 1, summing to 1 over a sample.

        Raises:
            StructureError: tokens without it.
        """
        return _attention(tokens)[..., None]


class RankScorer(TokenScorer):
    """Turns another score into a rank: the share of a sample's tokens that score lower.

    `Threshold(0.3)` then keeps 0.7 of them, to the nearest whole number (a half is dropped), whatever the scores, as
    EViT does always and DynamicViT at inference. The first token, which always stays, is not counted.

    Args:
        scorer: of tokens, or of features (..., D).
    """

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, tokens: Tokens) -> Tensor:
        """Between 0 and 1, in at least float32: bfloat16 rounds hundreds of ranks to equal ones."""
        score = self.scorer(tokens if isinstance(self.scorer, TokenScorer) else tokens.x)[..., 0]
        score = score.to(torch.promote_types(score.dtype, torch.float32))
        ranks, count = rank(torch.where(tokens.first() > 0, torch.inf, score), tokens)
        return ((ranks + 0.5) / (count - 1).clamp(min=1)).to(score.dtype)[..., None]


@dataclass(frozen=True)
class TokenRatio(Objective):
    """The ratio loss: (kept share - wanted share)^2, averaged over samples and dropping layers.

    Rao et al. 2021 (DynamicViT, arXiv:2106.02034, section 3.4). Shares are of all tokens but the first, in later layers
    too: a layer that keeps 0.7 of the 0.7 before it has 0.49.

    Args:
        shares: one for every TokenDrop, in the order of the model.
        per_sample: pull every sample to the share, as in the paper; otherwise the mean of the batch, from which samples
            may differ.

    Raises:
        ConfigError: no shares, or one outside [0, 1].
    """

    shares: Sequence[float]
    _: KW_ONLY
    per_sample: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        if not self.shares:
            raise ConfigError("shares must hold one share per TokenDrop, got none")
        for share in self.shares:
            check_shares(share=share)

    def __call__(self, answer: Any, y: Any, trace: Trace) -> Tensor:
        """Over the keeps in the trace.

        Raises:
            StructureError: another number of dropping layers than shares.
        """
        names = list(trace.all(TokenDrop))
        if len(names) != len(self.shares):
            raise StructureError(
                f"TokenRatio has shares for {len(self.shares)} layers, and this model drops tokens in {names}"
            )
        misses = []
        for name, wanted in zip(names, self.shares, strict=True):
            keep = torch.stack(trace[name]).mean(0)[:, 1:, 0]  # (B, T - 1)
            kept = keep.mean(1) if self.per_sample else keep.mean()
            misses.append((kept - wanted).square().mean())
        return torch.stack(misses).mean()


class WithTeacher(Dynamic):
    """A student with its teacher: in training the teacher's answers are logged; otherwise it is the student alone.

    Both are networks with `features`, from images to Tokens after all blocks, and `classify`, from Tokens to logits, as
    the token networks of the zoo are. The teacher is not a part of the module: its weights are neither trained nor
    saved.

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
        student: Any = self.student  # nn.Module does not declare `features` and `classify`
        if not self.training or self.trace is None:
            return student(x)
        teacher = vars(self)["teacher"].eval()
        with torch.no_grad():
            tokens = teacher.features(x)
            self.trace.log_answer(self, (teacher.classify(tokens), tokens.x))
        tokens = student.features(x)
        self.trace.log_answer(self, (None, tokens.x))
        return student.classify(tokens)


@dataclass(frozen=True)
class TokenDistillation(Objective):
    """DynamicViT's distillation for a `WithTeacher` model (arXiv:2106.02034, section 3.4).

    KL(teacher || answer), and the mean squared distance of the tokens that every layer kept.

    Args:
        logits: weight of the divergence.
        tokens: weight of the distance.
    """

    logits: float = 0.5
    tokens: float = 0.5

    def __call__(self, answer: Tensor, y: Any, trace: Trace) -> Tensor:
        """Over the answers in the trace; 0 in eval mode, in which the teacher does not run.

        Raises:
            StructureError: the model is not one `WithTeacher`, or has no TokenDrop.
        """
        layer, name = trace.one(WithTeacher)
        if not layer.training:
            return answer.new_zeros(())
        (wanted, theirs), (_, ours) = trace.answers[name]
        divergence = functional.kl_div(
            answer.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
        )
        stayed = torch.stack([trace[drop][-1] for drop in trace.all(TokenDrop)]).amin(0).detach()  # (B, T, 1)
        distance = ((ours - theirs).square().mean(-1, keepdim=True) * stayed).sum() / stayed.sum().clamp(min=1)
        return self.logits * divergence + self.tokens * distance


def _attention(tokens: Tokens) -> Tensor:
    if tokens.attention is None:
        raise StructureError(
            "tokens lack the attention of the class token; write `attention=class_attention(query, key, tokens, "
            "heads)` into them in the block before"
        )
    return tokens.attention


def _fused(tokens: Tokens, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The place of the fused token, 1 or 0 shaped as keep; and its features, spread over its sample's tokens."""
    alive = tokens.membership()
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
