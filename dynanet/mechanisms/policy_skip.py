"""Policy skip: one look at the input decides, in one shot, which of all the blocks run."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate


class PolicySkip(Dynamic):
    """Runs the blocks that a policy keeps (BlockDrop: Wu et al. 2018, arXiv:1711.08393).

    The policy sees the layer's own input (the image), not the blocks': hence `before` and `after`, so that the whole
    network can be one layer. Unit k is block k.

    Args:
        policy: maps the input to a Decision with one unit per block, keep (B, blocks).
        blocks: the units, shortcuts included.
        otherwise: what takes the place of each block, always computed; identities if None.
        before: from the input to the first block's (a stem); always runs.
        after: from the last block's answer to this layer's (a head); always runs.

    Attributes:
        free: in training the policy decides on so many of the last blocks, and those before them are kept;
            `curriculum` moves it. In eval mode it decides on all.

    Raises:
        StructureError: no blocks, or a number of units or shortcuts that is not theirs.
    """

    def __init__(
        self,
        policy: nn.Module,
        blocks: Sequence[nn.Module],
        otherwise: Sequence[nn.Module] | None = None,
        *,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        otherwise = otherwise if otherwise is not None else [nn.Identity() for _ in blocks]
        units = policy.units if isinstance(policy, Gate) else len(blocks)
        if not blocks or not len(blocks) == len(otherwise) == units:
            raise StructureError(
                f"a policy for {units} units got {len(blocks)} blocks and {len(otherwise)} shortcuts; give one block "
                f"and one shortcut per unit"
            )
        self.policy, self.blocks, self.otherwise = policy, nn.ModuleList(blocks), nn.ModuleList(otherwise)
        self.before = before if before is not None else nn.Identity()
        self.after = after if after is not None else nn.Identity()
        self.free = len(blocks)

    def forward(self, x: Any) -> Any:
        """The input to the last block's answer, or to that of `after`."""
        keep = self.tap(self._held(self.policy(x))).keep
        x = self.before(x)
        for k, (block, otherwise) in enumerate(zip(self.blocks, self.otherwise, strict=True)):
            x = self.run(k, block, keep[:, k], x, otherwise=otherwise(x))
        return self.after(x)

    def _held(self, decision: Decision) -> Decision:
        """The first blocks kept, and no gradient to scores that decided nothing: REINFORCE reads them."""
        held = len(self.blocks) - self.free
        if not self.training or held <= 0:
            return decision
        keep, score = decision
        ones = torch.ones_like(keep[:, :held])
        return Decision(torch.cat([ones, keep[:, held:]], 1), torch.cat([score[:, :held].detach(), score[:, held:]], 1))


class Bounded(nn.Module):
    """Scores whose probabilities stay away from 0 and 1 in training, so that both choices go on being tried.

    p becomes bound * p + (1 - bound) * (1 - p), and its logit is the score (arXiv:1711.08393, section 3.2; the
    authors' code takes 0.8). The sign does not change; in eval mode nothing does.

    Args:
        scorer: answers scores (rows, units).
        bound: the largest probability; 1 for none.

    Raises:
        ConfigError: a bound outside (0.5, 1].
    """

    def __init__(self, scorer: nn.Module, bound: float = 0.8) -> None:
        super().__init__()
        if not 0.5 < bound <= 1:
            raise ConfigError(f"a bound of {bound} on the probability of keeping; give a number above 0.5, at most 1")
        self.scorer, self.bound = scorer, bound

    def forward(self, x: Any) -> Tensor:
        """(rows, units)."""
        score = self.scorer(x)
        if not self.training or self.bound == 1:
            return score
        return ((1 - self.bound) + (2 * self.bound - 1) * score.sigmoid()).logit()


def curriculum(layer: PolicySkip, *, share: float = 0.5) -> Callable[[float], None]:
    """A schedule (`train.fit(schedules=[...])`) that hands the policy block after block, the last one first.

    At first the policy is free to drop the last block only; all of them from `share` of the training on
    (arXiv:1711.08393, section 3.3: one more block per epoch).

    Args:
        layer: whose `free` is set.
        share: of the training after which all blocks are free.

    Raises:
        ConfigError: a share that is none.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"a curriculum over a share of {share} of training; give a number above 0 and at most 1")
    blocks = len(layer.blocks)

    def set_free(progress: float) -> None:
        layer.free = min(blocks, 1 + math.floor(blocks * progress / share))

    return set_free
