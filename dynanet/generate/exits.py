"""Generation with exits: each token of each sequence takes as many layers as it needs (CALM, arXiv:2207.07061).

Rows of a batch exit independently, and those that continue are compacted. A token that exits early leaves no keys and
values in deeper layers: `CopyState` and `Recompute` are the two ways to supply them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynanet.calibrate.risk import certified
from dynanet.core.errors import ConfigError, InputError
from dynanet.generate.token_confidence import TokenConfidence
from dynanet.ops.decoding import Cache, Decoder, prefilled


class Generated(NamedTuple):
    """Generated tokens.

    Attributes:
        ids: (B, new) int64.
        exits: (B, new) int64, the number of the exit that predicted each token.
    """

    ids: Tensor
    exits: Tensor


class ExitRule(NamedTuple):
    """A token exits when its confidence reaches a threshold.

    Attributes:
        confidence: of a token's prediction.
        thresholds: one per exit except the last, in the units of the confidence; `confidence.level` converts.
    """

    confidence: TokenConfidence
    thresholds: tuple[float, ...]


class PendingTokens(NamedTuple):
    """Tokens that run together, some of each row, in a rectangle. The newest is in the last column.

    Attributes:
        x: (R, S, D) features.
        positions: (R, S).
        there: (R, S) bool, True where there is a token; None: everywhere.
    """

    x: Tensor
    positions: Tensor
    there: Tensor | None = None

    def present(self) -> Tensor:
        """`there` as a tensor."""
        return torch.ones_like(self.positions, dtype=torch.bool) if self.there is None else self.there

    def of(self, rows: Tensor) -> "PendingTokens":
        """The tokens of some rows, (R,) bool."""
        return PendingTokens(self.x[rows], self.positions[rows], None if self.there is None else self.there[rows])


class KVPolicy(ABC):
    """Supplies the keys and values of deeper layers for tokens that exited early.

    One object serves one call of `generate`; `fresh` makes it.
    """

    @abstractmethod
    def fresh(self, cache: Cache) -> "KVPolicy":
        """Make the policy of a new call."""

    @abstractmethod
    def left(self, stage: int, tokens: PendingTokens, rows: Tensor) -> None:
        """Note that tokens of rows (R,) exited before a stage."""

    @abstractmethod
    def due(self, stage: int, tokens: PendingTokens, rows: Tensor) -> PendingTokens:
        """Return all tokens to run through a stage, of which these come last."""


class CopyState(KVPolicy):
    """Deeper layers use the features with which the token exited, as if they had not changed them (CALM).

    Costs the projections to keys and values at every skipped layer. The cache differs from that of the whole model.
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self._cache = cache

    def fresh(self, cache: Cache) -> "CopyState":
        """Make the policy of a new call."""
        return CopyState(cache)

    def left(self, stage: int, tokens: PendingTokens, rows: Tensor) -> None:
        """Store keys and values of the tokens in all deeper layers."""
        assert self._cache is not None
        decoder = self._cache.decoder
        for layer in range(decoder.stage(stage).start, decoder.depth):
            self._cache.remember(layer, tokens.x, rows[:, None], tokens.positions)

    def due(self, stage: int, tokens: PendingTokens, rows: Tensor) -> PendingTokens:
        """Return the tokens alone."""
        return tokens


class Recompute(KVPolicy):
    """A token that goes deeper runs together with its row's tokens that had exited before.

    The cache is then exactly that of the whole model (for the same tokens). Work is deferred, and saved where no token
    goes deeper afterwards. KV recomputation in EE-LLM (Chen et al. 2023, arXiv:2312.04916), synchronised parallel
    decoding in FREE (Bae et al. 2023, arXiv:2310.05424).
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self._waiting: dict[tuple[int, int], dict[int, Tensor]] = {}  # by stage and row: features by position

    def fresh(self, cache: Cache) -> "Recompute":
        """Make the policy of a new call."""
        return Recompute(cache)

    def left(self, stage: int, tokens: PendingTokens, rows: Tensor) -> None:
        """Keep the tokens' features until one of their row goes deeper."""
        there = tokens.present()
        owners = rows[there.nonzero()[:, 0]].tolist()
        for row, position, x in zip(owners, tokens.positions[there].tolist(), tokens.x[there], strict=True):
            self._waiting.setdefault((stage, row), {})[position] = x

    def due(self, stage: int, tokens: PendingTokens, rows: Tensor) -> PendingTokens:
        """Return the rows' waiting tokens with these."""
        waiting = [self._waiting.pop((stage, row), {}) for row in rows.tolist()]
        longest = max((len(w) for w in waiting), default=0)
        if not longest:
            return tokens
        x = tokens.x.new_zeros(rows.shape[0], longest, tokens.x.shape[2])
        positions = tokens.positions.new_zeros(rows.shape[0], longest)
        counts = torch.tensor([len(w) for w in waiting], device=x.device)
        there = torch.arange(longest, device=x.device) < counts[:, None]
        x[there] = torch.stack([t for w in waiting for t in w.values()])
        positions[there] = torch.tensor([p for w in waiting for p in w], device=x.device)
        there = torch.cat([there, tokens.present()], 1)
        return PendingTokens(torch.cat([x, tokens.x], 1), torch.cat([positions, tokens.positions], 1), there)


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: Sequence[Tensor],
    new: int,
    *,
    leave: ExitRule | None = None,
    missing: KVPolicy | None = None,
) -> Generated:
    """Continue prompts greedily, all rows together, each token with its own exit.

    Args:
        decoder: a causal transformer in eval mode.
        prompts: (length,) int64 each, of any lengths, one token or more.
        new: number of tokens to generate for each.
        leave: when a token exits early; None: never, as in the whole model.
        missing: keys and values of skipped layers: `CopyState` (the default) or `Recompute`.

    Raises:
        InputError: a prompt that is missing, empty or not a row of token ids.
        ConfigError: another number of thresholds than exits before the last, or fewer than one new token.
    """
    check_prompts(decoder, prompts, new)
    stages = len(decoder.exits)
    if leave is not None and len(leave.thresholds) != stages - 1:
        raise ConfigError(f"{len(leave.thresholds)} thresholds for {stages} exits; give one per exit but the last")
    cache, last, position = prefilled(decoder, list(prompts), new)
    policy = (missing if missing is not None else CopyState()).fresh(cache)
    ids, exits = (torch.zeros(len(prompts), new, dtype=torch.int64, device=decoder.device) for _ in range(2))
    for step in range(new):
        rows = torch.arange(len(prompts), device=decoder.device)
        at = position[:, None]
        tokens = PendingTokens(decoder.embed(last[:, None], at), at)
        for stage in range(stages):
            tokens = policy.due(stage, tokens, rows)
            *first, final = decoder.stage(stage)
            before = cache.run(first, tokens.x, rows, tokens.positions, tokens.there)
            x = cache.run([final], before, rows, tokens.positions, tokens.there)
            tokens = tokens._replace(x=x)
            logits = decoder.logits(stage, x[:, -1])
            if stage + 1 == stages or leave is None:
                gone = torch.full_like(rows, stage + 1 == stages, dtype=torch.bool)
            else:
                gone = leave.confidence(logits, x[:, -1], before[:, -1]) >= leave.thresholds[stage]
            leaving = rows[gone]
            ids[leaving, step] = logits[gone].argmax(-1)
            exits[leaving, step] = stage
            if stage + 1 < stages and leaving.numel():
                policy.left(stage + 1, tokens.of(gone), leaving)
            rows = rows[~gone]
            tokens = tokens.of(~gone)
            if not rows.numel():
                break
        last = ids[:, step]
        position = position + 1
    return Generated(ids, exits)


def certify(
    decoder: Decoder,
    prompts: Sequence[Tensor],
    new: int,
    confidence: TokenConfidence,
    shares: Sequence[float],
    *,
    risk: float,
    delta: float,
    missing: KVPolicy | None = None,
) -> ExitRule | None:
    """Find the lowest threshold whose texts are certified to differ little from the whole model's (Learn-then-Test).

    With probability 1 - delta over the draw of the prompts, the expected share of tokens that differ from the whole
    model's greedy text is at most `risk` (CALM's textual consistency, section 4; `calibrate.risk` does the test).
    Tokens are compared position by position: a text shifted by one token counts as another text.

    Args:
        decoder: in eval mode.
        prompts: held-out ones, drawn independently.
        new: number of tokens to generate for each.
        confidence: of a token's prediction.
        shares: thresholds as in the paper, between 0 and 1, the same at every exit, in descending order, chosen
            without these prompts.
        risk: in (0, 1).
        delta: in (0, 1).
        missing: as in `generate`.

    Returns:
        The rule; None if not even the highest threshold can be certified.

    Raises:
        ConfigError: thresholds that are not in descending order.
        BudgetError: risk or delta outside (0, 1).
    """
    if not shares or list(shares) != sorted(set(shares), reverse=True):
        raise ConfigError(f"shares is {list(shares)}; expected thresholds in descending order")
    whole = generate(decoder, prompts, new).ids
    rules = [ExitRule(confidence, (confidence.level(share),) * (len(decoder.exits) - 1)) for share in shares]
    losses = []
    for rule in rules:
        ids = generate(decoder, prompts, new, leave=rule, missing=missing).ids
        losses.append((ids != whole).double().mean(1).cpu().numpy())
        if losses[-1].mean() > risk:  # it fails, and testing stops at the first failure
            break
    kept = certified(np.stack(losses, 1), risk, delta)
    return rules[kept - 1] if kept else None


def check_prompts(decoder: Decoder, prompts: Sequence[Tensor], new: int, ahead: int = 0) -> None:
    """Check that a decoder can continue prompts.

    Args:
        decoder: that continues them.
        prompts: (length,) each.
        new: number of tokens to generate.
        ahead: number of positions that drafts need beyond these.

    Raises:
        InputError: a prompt that is missing, empty or not a row of token ids, tokens outside the vocabulary, or more
            tokens than the decoder has positions.
        ConfigError: fewer than one new token.
    """
    if new < 1:
        raise ConfigError(f"new is {new}; expected 1 token or more")
    if isinstance(prompts, Tensor):
        raise InputError(f"prompts is a tensor of shape {tuple(prompts.shape)}; expected a list of them: list(prompts)")
    if not prompts:
        raise InputError("no prompts to continue; give at least one")
    for number, prompt in enumerate(prompts):
        if prompt.dim() != 1 or prompt.dtype != torch.int64 or not prompt.numel():
            raise InputError(
                f"prompt {number} has shape {tuple(prompt.shape)} and {prompt.dtype}; expected (length,) token ids of "
                f"torch.int64, one or more (begin an empty prompt with a separator token, such as a newline)"
            )
        decoder.check(prompt, prompt.shape[0] + new - 1 + ahead)  # the last token is not read again
