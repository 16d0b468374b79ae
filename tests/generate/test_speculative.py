"""Self-speculative decoding answers what the whole model does, in fewer passes."""

import copy

import pytest
import torch

from dynanet.core.errors import ConfigError, InputError
from dynanet.core.macs import CountMacs
from dynanet.generate.exits import generate
from dynanet.generate.speculative import speculate
from tests.generate.conftest import NEW


@pytest.mark.parametrize("exit", [0, 1])
@pytest.mark.parametrize("draft", [1, 4])
def test_self_speculation_is_the_whole_model_token_for_token(exit, draft, model, prompts, whole):
    found = speculate(model, prompts, NEW, exit=exit, draft=draft)
    assert torch.equal(found.ids, whole)
    assert 0 <= found.accepted <= found.drafted and found.passes <= NEW


def test_good_drafts_save_passes(model, prompts):
    """A model whose layers after the first do nothing drafts without a mistake."""
    easy = copy.deepcopy(model)
    with torch.no_grad():
        for block in list(easy.blocks)[1:]:
            for linear in (block.project, block.feed_forward[2]):
                linear.weight.zero_()
                linear.bias.zero_()
        for norm in easy.norms:
            norm.load_state_dict(easy.norms[-1].state_dict())
    found = speculate(easy, prompts, 10, exit=0, draft=4)
    assert found.accepted == found.drafted and found.passes == 2
    assert torch.equal(found.ids, generate(easy, prompts, 10).ids)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([], "no prompts"),
        ([torch.zeros(0, dtype=torch.int64)], "prompt 0"),
        ([torch.ones(3)], "int64"),
        ([torch.tensor([3, 20])], "token ids from 3 to 20 for a vocabulary of 20"),
        ([torch.tensor([-1])], "token ids from -1 to -1"),
        (torch.zeros(2, 3, dtype=torch.int64), "expected a list of them"),
    ],
)
def test_prompts_that_are_none_are_refused(bad, said, model):
    with pytest.raises(InputError, match=said):
        speculate(model, bad, 3)


def test_there_must_be_room_for_the_drafts_too(model, prompts):
    with CountMacs() as count:
        with pytest.raises(InputError, match="68 tokens in a network for 64; prompt, new tokens and drafts"):
            speculate(model, prompts, 56, draft=4)
    assert count.total == 0, "said before anything is computed"
    assert speculate(model, prompts, 52).ids.shape == (4, 52)


@pytest.mark.parametrize(("exit", "draft"), [(2, 4), (-1, 4), (0, 0)])
def test_an_exit_that_cannot_draft_is_refused(exit, draft, model, prompts):
    with pytest.raises(ConfigError, match="expected an exit from 0 to 1"):
        speculate(model, prompts, 3, exit=exit, draft=draft)
