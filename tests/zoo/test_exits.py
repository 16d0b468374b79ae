"""Stages end where exits are, and together are the blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dynanet.core.errors import ConfigError
from dynanet.zoo.exits import check_exits, split_at


@given(st.integers(1, 9), st.data())
def test_stages_are_the_blocks_in_their_order(count, data):
    exits = sorted({*data.draw(st.lists(st.integers(0, count - 1))), count - 1})
    assert check_exits(tuple(exits), count) == exits
    blocks, first = [nn.Identity() for _ in range(count)], nn.Identity()
    stages = split_at(blocks, exits)
    assert [block for stage in stages for block in stage] == blocks
    assert [blocks.index(stage[-1]) for stage in stages] == exits
    with_first = split_at(blocks, exits, first)
    assert list(with_first[0]) == [first, *stages[0]]
    assert list(map(list, with_first[1:])) == list(map(list, stages[1:]))


@pytest.mark.parametrize("exits", [[], [0, 1], [2, 1, 3], [1, 1, 3], [-1, 3], [1, 4], "3"])
def test_exits_that_blocks_do_not_have_are_refused(exits):
    with pytest.raises(ConfigError, match="heads must be ascending numbers from 0 to 3, the last included, got"):
        check_exits(exits, 4, "heads")
