"""Self-speculative decoding: an early exit drafts tokens, the rest of the same model verifies them in one pass.

LayerSkip (Elhoushi et al. 2024, arXiv:2404.16710, section 4.3). The layers up to the exit are computed once for both.
The text is the whole model's greedy text, token for token; only the number of passes is adaptive.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dynanet.core.errors import ConfigError
from dynanet.generate.exits import check_prompts
from dynanet.ops.decoding import Decoder, prefilled


class Speculated(NamedTuple):
    """Generated tokens.

    Attributes:
        ids: (B, new) int64.
        drafted: number of tokens that the exit drafted.
        accepted: number of these that the whole model accepted.
        passes: number of passes through the rest of the model.
    """

    ids: Tensor
    drafted: int
    accepted: int
    passes: int


@torch.no_grad()
def speculate(decoder: Decoder, prompts: Sequence[Tensor], new: int, *, exit: int = 0, draft: int = 4) -> Speculated:
    """Continue prompts greedily by the whole model, with drafts of one of its exits.

    Sums are taken in another order than token by token; in floating point, tied tokens may come out differently.

    Args:
        decoder: a causal transformer in eval mode.
        prompts: (length,) int64 each, of any lengths, one token or more.
        new: number of tokens to generate for each.
        exit: number of the exit that drafts, not the last.
        draft: number of tokens per draft; every row accepts the correct ones.

    Raises:
        InputError: as `generate`.
        ConfigError: an exit that does not exist, or an empty draft.
    """
    if not 0 <= exit < len(decoder.exits) - 1 or draft < 1:
        raise ConfigError(
            f"exit {exit} and drafts of {draft}; expected an exit from 0 to {len(decoder.exits) - 2} (the last checks) "
            f"and 1 token or more"
        )
    check_prompts(decoder, prompts, new, ahead=draft)
    cache, last, position = prefilled(decoder, list(prompts), new + draft + 1)
    early = range(decoder.exits[exit] + 1)
    rest = range(decoder.exits[exit] + 1, decoder.depth)
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
        for ahead in range(draft + 1):  # tokens that agree are right, and the model's next one is known too
            mine = agrees >= ahead
            ids[rows[mine], done[rows[mine]] + ahead] = right[mine, ahead]
        last[rows] = right.gather(1, agrees[:, None])[:, 0]
        position[rows] += agrees + 1
        done[rows] += agrees + 1
        drafted += draft * len(rows)
        accepted += int(agrees.sum())
        passes += 1
        rows = rows[done[rows] < new]
    return Speculated(ids[:, :new], drafted, accepted, passes)
