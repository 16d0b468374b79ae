"""What models tell a session cannot be told by halves."""

import pytest
import torch
from torch import nn

from dynanet.core.serving import CalledInParts, FrameByFrame, PartByPart


@pytest.mark.parametrize("interface", [FrameByFrame, PartByPart])
def test_an_interface_with_a_method_missing_cannot_be_made(interface):
    methods = sorted(interface.__abstractmethods__)
    for missing in methods:
        rest = {name: lambda self: None for name in methods if name != missing}
        with pytest.raises(TypeError, match=missing):
            type("Half", (interface,), rest)()
    assert type("Whole", (interface,), {name: lambda self: None for name in methods})()


def test_a_mark_changes_nothing_of_the_module_that_bears_it():
    class Marked(nn.Linear, CalledInParts):
        pass

    torch.manual_seed(0)
    plain, marked = nn.Linear(3, 2), Marked(3, 2)
    marked.load_state_dict(plain.state_dict())
    assert torch.equal(marked(torch.ones(1, 3)), plain(torch.ones(1, 3)))
    assert isinstance(marked, CalledInParts) and not isinstance(plain, CalledInParts)
