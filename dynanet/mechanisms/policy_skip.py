"""Policy skip: a policy network sees the input and decides once which blocks run."""

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

    The policy sees the input of this layer (the image), not that of the blocks. With `before` and `after` the whole
    network can be one layer. Unit k is block k.

    Args:
        policy: maps the input to a Decision with one unit per block, keep (B, blocks).
        blocks: the units, shortcuts included.
        otherwise: one module per block that replaces it where it is skipped, always computed; identities if None.
        before: maps the input to that of the first block (a stem); always runs.
        after: maps the answer of the last block to that of this layer (a head); always runs.

    Attributes:
        free: number of blocks, counted from the last, that the policy decides on in training; those before are kept.
            `curriculum` changes it. In eval mode the policy decides on all.

    Raises:
        StructureError: no blocks, or the numbers of blocks, units and shortcuts differ.
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
        self.policy = policy
        self.blocks = nn.ModuleList(blocks)
        self.otherwise = nn.ModuleList(otherwise)
        self.before = before if before is not None else nn.Identity()
        self.after = after if after is not None else nn.Identity()
        self.free = len(blocks)

    def forward(self, x: Any) -> Any:
        """Map the input to the answer of the last block, or of `after`."""
        keep = self.tap(self._held(self.policy(x))).keep
        x = self.before(x)
        for k, (block, otherwise) in enumerate(zip(self.blocks, self.otherwise, strict=True)):
            x = self.run(k, block, keep[:, k], x, otherwise=otherwise(x))
        return self.after(x)

    def _held(self, decision: Decision) -> Decision:
        """Keep the first blocks, and detach their scores: REINFORCE must not credit decisions that were not made."""
        held = len(self.blocks) - self.free
        if not self.training or held <= 0:
            return decision
        keep, score = decision
        ones = torch.ones_like(keep[:, :held])
        return Decision(torch.cat([ones, keep[:, held:]], 1), torch.cat([score[:, :held].detach(), score[:, held:]], 1))


class Bounded(nn.Module):
    """Bounds the probabilities of scores in training, so that both choices continue to be explored.

    p becomes bound * p + (1 - bound) * (1 - p), and its logit is the score (arXiv:1711.08393, section 3.2; 0.8 in the
    authors' code). The sign stays, and in eval mode scores are unchanged.

    Args:
        scorer: returns scores (rows, units).
        bound: the largest probability; 1 for no bound.

    Raises:
        ConfigError: a bound outside (0.5, 1].
    """

    def __init__(self, scorer: nn.Module, bound: float = 0.8) -> None:
        super().__init__()
        if not 0.5 < bound <= 1:
            raise ConfigError(f"bound must be above 0.5 and at most 1, got {bound}")
        self.scorer, self.bound = scorer, bound

    def forward(self, x: Any) -> Tensor:
        """Scores (rows, units)."""
        score = self.scorer(x)
        if not self.training or self.bound == 1:
            return score
        return ((1 - self.bound) + (2 * self.bound - 1) * score.sigmoid()).logit()


def curriculum(layer: PolicySkip, *, share: float = 0.5) -> Callable[[float], None]:
    """A schedule (`train.fit(schedules=[...])`) that frees block after block for the policy, the last one first.

    The policy may drop the last block only at first, and every block after `share` of the training (arXiv:1711.08393,
    section 3.3: one more block per epoch).

    Args:
        layer: its `free` is set.
        share: fraction of the training after which all blocks are free.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share of training must be above 0 and at most 1, got a share of {share}")
    blocks = len(layer.blocks)

    def set_free(progress: float) -> None:
        layer.free = min(blocks, 1 + math.floor(blocks * progress / share))

    return set_free
