"""A Decision is a tuple of keep and score, so that gradients, trees and jit see its tensors."""

import torch
from torch.utils._pytree import tree_leaves, tree_map

from dynanet.core.decision import Decision


def test_a_tree_of_decisions_stays_one():
    decision = Decision(torch.ones(2, 1), torch.zeros(2, 1))
    halves = tree_map(torch.Tensor.half, [decision])
    assert isinstance(halves[0], Decision) and halves[0].keep.dtype == torch.float16
    assert tree_leaves(decision)[0] is decision.keep and tree_leaves(decision)[1] is decision.score


def test_one_part_is_replaced_and_the_other_stays():
    decision = Decision(torch.ones(2, 1), torch.zeros(2, 1))
    changed = decision._replace(keep=torch.zeros(2, 1))
    assert changed.score is decision.score and decision.keep.sum() == 2 and changed.keep.sum() == 0
