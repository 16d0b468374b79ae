import pytest
import torch

from dynanet.core.errors import ConfigError
from dynanet.gates.recurrent import RecurrentGate
from dynanet.gates.rules import Threshold


def gate(channels=(4, 4, 6)):
    torch.manual_seed(0)
    return RecurrentGate(channels, Threshold(), bias=0.0)


def test_it_pools_projects_remembers_and_scores():
    made, x = gate(), torch.randn(5, 4, 3, 7)
    memory = made.start(x)
    decision, memory = made(0, x, memory)
    h, c = made.cell(made.project[0](x.mean((2, 3))), None)
    torch.testing.assert_close(decision.score, made.gate.scorer(h))
    assert torch.equal(decision.keep, (decision.score > 0).float())
    torch.testing.assert_close(memory, (h, c))


def test_what_came_before_changes_what_comes_after():
    made, x = gate(), torch.randn(5, 4)
    fresh = made(1, x, made.start(x))[0].score
    after = made(1, x, made(0, x, made.start(x))[1])[0].score
    assert (fresh - after).abs().min() > 0


def test_blocks_may_have_different_widths_and_share_all_but_the_projection():
    made = gate()
    assert made.blocks == 3
    assert made(2, torch.randn(2, 6, 5, 5), made.start(torch.zeros(2, 6)))[0].keep.shape == (2, 1)
    shared = 2 * 4 * 10 * 10 + 2 * 4 * 10 + 11
    assert sum(p.numel() for p in made.parameters()) == shared + 10 * (4 + 4 + 6) + 3 * 10


def test_an_empty_batch():
    made = gate()
    decision, _ = made(0, torch.zeros(0, 4, 2, 2), made.start(torch.zeros(0, 4)))
    assert decision.keep.shape == (0, 1)


@pytest.mark.parametrize("channels, sizes", [((), {}), ((4, 0), {}), ((4,), {"hidden": 0}), ((4,), {"embedding": 0})])
def test_what_means_no_gate_is_refused(channels, sizes):
    with pytest.raises(ConfigError, match="at least 1"):
        RecurrentGate(channels, Threshold(), **sizes)
