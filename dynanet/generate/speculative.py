"""Self-speculative decoding: an early exit drafts tokens, the rest of the same model checks them all in one pass.

LayerSkip (Elhoushi et al. 2024, arXiv:2404.16710, section 4.3). The layers up to the exit are computed once and serve
both. What comes out is the whole model's greedy text, token for token; only how many passes it takes is adaptive.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynanet.core.errors import ConfigError
from dynanet.generate.exits import check_prompts
from dynanet.ops.decoding import Decoder, prefilled


class Speculated(NamedTuple):
    """What was generated.

    Attributes:
        ids: (B, new) int64.
        drafted: tokens that the exit drafted.
        accepted: those among them that the whole model agreed with.
        passes: how often the rest of the model ran.
    """

    ids: Tensor
    drafted: int
    accepted: int
    passes: int


@torch.no_grad()
def speculate(decoder: Decoder, prompts: Sequence[Tensor], new: int, *, exit: int = 0, draft: int = 4) -> Speculated:
    """The whole model's greedy continuation, drafted by one of its exits.

    Sums are taken in another order than token by token, so that in floating point two tokens whose logits tie may
    change places.

    Args:
        decoder: a causal transformer in eval mode.
        prompts: (length,) int64 each, of any lengths, one token or more.
        new: tokens to generate for each.
        exit: number of the exit that drafts, not the last.
        draft: tokens per draft; rows accept as many as are right, each on its own.

    Raises:
        InputError: as `generate`.
        ConfigError: no such exit, or an empty draft.
    """
    if not 0 <= exit < len(decoder.exits) - 1 or draft < 1:
        raise ConfigError(
            f"exit {exit} and drafts of {draft}; expected an exit from 0 to {len(decoder.exits) - 2} (the last checks) "
            f"and 1 token or more"
        )
    check_prompts(decoder, prompts, new, ahead=draft)
    cache, last, position = prefilled(decoder, list(prompts), new + draft + 1)
    early, rest = range(decoder.exits[exit] + 1), range(decoder.exits[exit] + 1, decoder.depth)
    ids = torch.zeros(len(prompts), new + draft + 1, dtype=torch.int64, device=decoder.device)
    done = torch.zeros_like(last)
    drafted = accepted = passes = 0
    rows = torch.arange(len(prompts), device=decoder.device)
    while rows.numel():
        tokens, features = [last[rows]], []
        for ahead in range(draft + 1):
            at = position[rows, None] + ahead
            features.append(cache.run(early, decoder.embed(tokens[-1][:, None], at), rows, at))
            if ahead < draft:
                tokens.append(decoder.logits(exit, features[-1][:, 0]).argmax(-1))
        at = position[rows, None] + torch.arange(draft + 1, device=decoder.device)
        x = cache.run(rest, torch.cat(features, 1), rows, at)
        right = decoder.logits(len(decoder.exits) - 1, x).argmax(-1)  # (R, draft + 1)
        agrees = (torch.stack(tokens[1:], 1) == right[:, :-1]).long().cumprod(1).sum(1)
        for ahead in range(draft + 1):  # the tokens that agree are the right ones; one more is known beyond them
            mine = agrees >= ahead
            ids[rows[mine], done[rows[mine]] + ahead] = right[mine, ahead]
        last[rows] = right.gather(1, agrees[:, None])[:, 0]
        position[rows] += agrees + 1
        done[rows] += agrees + 1
        drafted, accepted, passes = drafted + draft * len(rows), accepted + int(agrees.sum()), passes + 1
        rows = rows[done[rows] < new]
    return Speculated(ids[:, :new], drafted, accepted, passes)
