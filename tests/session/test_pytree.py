"""A pytree is taken apart for an engine and put together with what the engine returns."""

import pytest
import torch
from torch.utils._pytree import tree_map

from dynanet.session.pytree import Layout, tensors_of

A, B = torch.ones(2), torch.zeros(3, 1)
TREES = {
    "a tensor": (A, 1),
    "nothing": (None, 0),
    "no tensor": ((3, "size"), 0),
    "nested": ({"state": [A, 4], "text": "x", "more": (None, B)}, 2),
    "others first": ([None, 3, A, 5, B, None], 2),
}


@pytest.mark.parametrize("name", TREES)
def test_filling_a_layout_undoes_taking_the_tensors(name):
    tree, count = TREES[name]
    tensors, layout = tensors_of(tree), Layout(tree)
    assert len(tensors) == layout.tensors == count
    again = layout.filled([t + 1 for t in tensors])
    assert repr(again) == repr(tree_map(lambda leaf: leaf + 1 if isinstance(leaf, torch.Tensor) else leaf, tree))


def test_tensors_come_in_the_order_of_the_tree_and_are_not_copied():
    found = tensors_of(([A, 1], {"b": B}, A))
    assert [t is expected for t, expected in zip(found, (A, B, A), strict=True)] == [True] * 3


def test_a_layout_can_be_filled_again_and_keeps_no_tensor():
    layout = Layout([A, None, B])
    assert not any(isinstance(value, torch.Tensor) for value in vars(layout)["_others"].values())
    first, second = layout.filled([B, A]), layout.filled([A, A])
    assert first[0] is B and second[0] is A and first[1] is None
