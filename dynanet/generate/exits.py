"""Generation with exits: each token of each sequence takes as many layers as it needs (CALM, arXiv:2207.07061).

A batch's rows leave apart: those that go on are compacted. What deeper layers should have remembered of a token that
left early is the question of every such system; the two answers are `CopyState` and `Recompute`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynanet.calibrate.risk import certified
from dynanet.core.errors import ConfigError, InputError
from dynanet.gates.token_confidence import TokenConfidence
from dynanet.ops.decoding import Cache, Decoder, prefilled


class Generated(NamedTuple):
    """What was generated.

    Attributes:
        ids: (B, new) int64.
        exits: (B, new) int64, the number of the exit that gave each token.
    """

    ids: Tensor
    exits: Tensor


class ExitRule(NamedTuple):
    """When a token leaves: its confidence reaches a threshold.

    Attributes:
        confidence: how sure a token is.
        thresholds: one per exit but the last, in the units of the confidence; `confidence.level` converts.
    """

    confidence: TokenConfidence
    thresholds: tuple[float, ...]


class PendingTokens(NamedTuple):
    """Tokens that run together, some of each row, in a rectangle. The newest stands in the last column.

    Attributes:
        x: (R, S, D) features.
        positions: (R, S).
        there: (R, S) bool, which tokens there are; None: all.
    """

    x: Tensor
    positions: Tensor
    there: Tensor | None = None

    def present(self) -> Tensor:
        """`there`, whoever is."""
        return torch.ones_like(self.positions, dtype=torch.bool) if self.there is None else self.there

    def of(self, rows: Tensor) -> "PendingTokens":
        """Those of some rows, (R,) bool."""
        return PendingTokens(self.x[rows], self.positions[rows], None if self.there is None else self.there[rows])


class KVPolicy(ABC):
    """What becomes of the keys and values that a token which left early does not leave in deeper layers.

    One object serves one call of `generate`; `fresh` makes it.
    """

    @abstractmethod
    def fresh(self, cache: Cache) -> "KVPolicy":
        """For a new call."""

    @abstractmethod
    def left(self, stage: int, tokens: PendingTokens, rows: Tensor) -> None:
        """Tokens of rows (R,) left in front of a stage."""

    @abstractmethod
    def due(self, stage: int, tokens: PendingTokens, rows: Tensor) -> PendingTokens:
        """Tokens to run through a stage together with these, which come last."""


class CopyState(KVPolicy):
    """Deeper layers remember the features with which the token left, as if they had changed nothing (CALM).

    Costs the projections to keys and values at every skipped layer. What later tokens see differs from the whole
    model's memory.
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self._cache = cache

    def fresh(self, cache: Cache) -> "CopyState":  # noqa: D102
        return CopyState(cache)

    def left(self, stage: int, tokens: PendingTokens, rows: Tensor) -> None:  # noqa: D102
        assert self._cache is not None
        decoder = self._cache.decoder
        for layer in range(decoder.stage(stage).start, decoder.depth):
            self._cache.remember(layer, tokens.x, rows[:, None], tokens.positions)

    def due(self, stage: int, tokens: PendingTokens, rows: Tensor) -> PendingTokens:  # noqa: D102
        return tokens


class Recompute(KVPolicy):
    """A token that goes deeper takes along its row's tokens that had left before: one pass for all of them.

    Deeper layers then remember exactly what the whole model would (for the same tokens). Work is put off, and never
    done for what no deeper token follows. EE-LLM (Chen et al. 2023, arXiv:2312.04916) calls it KV recomputation, FREE
    (Bae et al. 2023, arXiv:2310.05424) synchronised parallel decoding.
    """

    def __init__(self, cache: Cache | None = None) -> None:
        self._waiting: dict[tuple[int, int], dict[int, Tensor]] = {}  # by stage and row: features by position

    def fresh(self, cache: Cache) -> "Recompute":  # noqa: D102
        return Recompute(cache)

    def left(self, stage: int, tokens: PendingTokens, rows: Tensor) -> None:  # noqa: D102
        there = tokens.present()
        owners = rows[there.nonzero()[:, 0]].tolist()
        for row, position, x in zip(owners, tokens.positions[there].tolist(), tokens.x[there], strict=True):
            self._waiting.setdefault((stage, row), {})[position] = x

    def due(self, stage: int, tokens: PendingTokens, rows: Tensor) -> PendingTokens:  # noqa: D102
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
    """Greedy continuation of prompts, all rows together, each token with its own exit.

    Args:
        decoder: a causal transformer; its mode is left as it is, and should be eval.
        prompts: (length,) int64 each, of any lengths, one token or more.
        new: tokens to generate for each.
        leave: when a token leaves early; None: never, the whole model.
        missing: `CopyState` (the default) or `Recompute`.

    Raises:
        InputError: no prompts, an empty one, or one that is no row of token ids.
        ConfigError: not one threshold per exit but the last, or fewer than one new token.
    """
    check_prompts(decoder, prompts, new)
    stages = len(decoder.exits)
    if leave is not None and len(leave.thresholds) != stages - 1:
        raise ConfigError(f"{len(leave.thresholds)} thresholds for {stages} exits; give one per exit but the last")
    cache, last, position = prefilled(decoder, list(prompts), new)
    policy = (missing if missing is not None else CopyState()).fresh(cache)
    ids, exits = (torch.zeros(len(prompts), new, dtype=torch.int64, device=decoder.device) for _ in range(2))
    for step in range(new):
        rows, at = torch.arange(len(prompts), device=decoder.device), position[:, None]
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
            ids[leaving, step], exits[leaving, step] = logits[gone].argmax(-1), stage
            if stage + 1 < stages and leaving.numel():
                policy.left(stage + 1, tokens.of(gone), leaving)
            rows, tokens = rows[~gone], tokens.of(~gone)
            if not rows.numel():
                break
        last, position = ids[:, step], position + 1
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
    """The most eager threshold whose texts differ little from the whole model's, promised by Learn-then-Test.

    With probability 1 - delta over the draw of the prompts, the expected share of tokens that differ from the whole
    model's greedy text is at most `risk` (CALM's textual consistency, section 4; `calibrate.risk` does the test).
    Positions are compared one by one, so a text that says the same one token later counts as another text.

    Args:
        decoder: in eval mode.
        prompts: held-out ones, drawn independently.
        new: tokens to generate for each.
        confidence: how sure a token is.
        shares: thresholds as the paper's, between 0 and 1, the same at every exit, from the most careful to the most
            eager, chosen without looking at these prompts.
        risk: in (0, 1).
        delta: in (0, 1).
        missing: as in `generate`.

    Returns:
        The rule; None: not even the most careful one can be promised, so never leave early.

    Raises:
        ConfigError: thresholds that do not fall.
        BudgetError: risk or delta outside (0, 1).
    """
    if not shares or list(shares) != sorted(set(shares), reverse=True):
        raise ConfigError(f"shares is {list(shares)}; expected falling thresholds, the most careful one first")
    whole = generate(decoder, prompts, new).ids
    rules = [ExitRule(confidence, (confidence.level(share),) * (len(decoder.exits) - 1)) for share in shares]
    losses = []
    for rule in rules:
        ids = generate(decoder, prompts, new, leave=rule, missing=missing).ids
        losses.append((ids != whole).double().mean(1).cpu().numpy())
        if losses[-1].mean() > risk:  # it fails, and testing stops at the first that does
            break
    kept = certified(np.stack(losses, 1), risk, delta)
    return rules[kept - 1] if kept else None


def check_prompts(decoder: Decoder, prompts: Sequence[Tensor], new: int, ahead: int = 0) -> None:
    """Refuse what cannot be continued.

    Args:
        decoder: that is to continue them.
        prompts: (length,) each.
        new: tokens asked for.
        ahead: positions that drafts take beyond them.

    Raises:
        InputError: no prompts, an empty one, one that is no row of token ids, tokens that the decoder does not know, or
            more of them than it has positions for.
        ConfigError: fewer than one new token.
    """
    if new < 1:
        raise ConfigError(f"{new} new tokens asked for; expected 1 or more")
    if isinstance(prompts, Tensor):
        raise InputError(f"prompts is a tensor of shape {tuple(prompts.shape)}; expected a list of them: list(prompts)")
    if not prompts:
        raise InputError("no prompts to continue; give at least one")
    for number, prompt in enumerate(prompts):
        if prompt.dim() != 1 or prompt.dtype != torch.int64 or not prompt.numel():
            raise InputError(
                f"prompt {number} has shape {tuple(prompt.shape)} and {prompt.dtype}; expected (length,) token ids of "
                f"torch.int64, one or more (begin an empty one with a token that stands before texts, a newline say)"
            )
        decoder.check(prompt, prompt.shape[0] + new - 1 + ahead)  # the last token is not read again
