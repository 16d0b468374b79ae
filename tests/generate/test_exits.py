"""Generation with exits: rows leave apart, memories are what they are called, promises hold."""

import pytest
import torch

from dynanet.core.errors import ConfigError, InputError
from dynanet.core.macs import CountMacs
from dynanet.generate.exits import CopyState, ExitRule, PendingTokens, Recompute, certify, generate
from dynanet.generate.token_confidence import LearnedToken, SoftmaxGap
from dynanet.ops.decoding import prefilled
from tests.generate.conftest import NEW, step_by_step

SOMETIMES = ExitRule(SoftmaxGap(), (SoftmaxGap().level(0.3), SoftmaxGap().level(0.3)))


def test_without_exits_it_is_the_whole_model(model, prompts, whole):
    found = generate(model, prompts, NEW)
    assert torch.equal(found.ids, whole) and (found.exits == 2).all()


def test_recomputed_memory_is_the_whole_models(model, prompts):
    """Every token and every exit is as if all layers had been run for all earlier tokens."""
    found = generate(model, prompts, NEW, leave=SOMETIMES, missing=Recompute())
    assert len(found.exits.unique()) == 3, "all exits are used"
    for i, prompt in enumerate(prompts):
        ids, exits = step_by_step(model, prompt, SOMETIMES)
        assert torch.equal(found.ids[i], ids) and torch.equal(found.exits[i], exits)


def test_copied_memory_is_that_of_the_state_that_left(model):
    """After a token left at the first exit, deeper layers remember projections of its features there."""
    prompt = torch.tensor([4])
    cache, last, position = prefilled(model, [prompt], 2)
    policy = CopyState().fresh(cache)
    rows, at = torch.arange(1), position[:, None]
    with torch.no_grad():
        x = cache.run(model.stage(0), model.embed(last[:, None], at), rows, at)
        policy.left(1, PendingTokens(x, at), rows)
        for layer in (1, 2, 3, 4):
            torch.testing.assert_close(cache.keys[layer][:, 0], model.key_value(layer, x)[0][:, 0])
            torch.testing.assert_close(cache.values[layer][:, 0], model.key_value(layer, x)[1][:, 0])


@pytest.mark.parametrize("missing", [CopyState(), Recompute()], ids=["copy", "recompute"])
def test_rows_do_not_influence_each_other(missing, model, prompts):
    together = generate(model, prompts, NEW, leave=SOMETIMES, missing=missing)
    for i, prompt in enumerate(prompts):
        alone = generate(model, [prompt], NEW, leave=SOMETIMES, missing=missing)
        assert torch.equal(alone.ids[0], together.ids[i]) and torch.equal(alone.exits[0], together.exits[i])
    assert not torch.equal(together.exits[0], together.exits[1])


def test_leaving_early_costs_less(model, prompts):
    always = ExitRule(SoftmaxGap(), (-1.0, -1.0))
    macs = []
    for leave, missing in ((None, None), (always, CopyState()), (always, Recompute())):
        with CountMacs() as count:
            found = generate(model, prompts, NEW, leave=leave, missing=missing)
        macs.append(count.total)
    assert (found.exits == 0).all()
    assert macs[2] < macs[1] < macs[0], "recomputing puts off what copying pays at once"


def test_rows_with_less_to_recompute_do_not_pay_for_others(model, prompts):
    same = [p[:1] for p in prompts]  # of one length: attention looks as far back in a batch as alone
    with CountMacs() as count:
        found = generate(model, same, NEW, leave=SOMETIMES, missing=Recompute())
    assert len({tuple(row) for row in found.exits.tolist()}) > 1, "rows leave apart"
    with CountMacs() as alone:
        for prompt in same:
            generate(model, [prompt], NEW, leave=SOMETIMES, missing=Recompute())
    assert alone.total <= count.total <= 1.1 * alone.total, "what is padded is attention alone"


def test_a_promise_is_kept_or_not_given(model):
    drawn = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:120].tolist()
    prompts = [torch.tensor([i % 20, i // 20]) for i in drawn]
    shares = [0.999, 0.5, 0.2, 0.05]
    leave = certify(model, prompts[:60], 6, SoftmaxGap(), shares, risk=0.3, delta=0.1, missing=Recompute())
    assert leave is not None
    whole, early = generate(model, prompts[60:], 6), generate(model, prompts[60:], 6, leave=leave, missing=Recompute())
    assert (whole.ids != early.ids).double().mean() <= 0.3
    nothing = certify(model, prompts[:5], 6, SoftmaxGap(), shares, risk=0.01, delta=0.01)
    assert nothing is None, "five prompts promise nothing at this risk"


def test_what_makes_no_sense(model, prompts):
    for bad, said in (
        ([], "no prompts"),
        ([torch.zeros(0, dtype=torch.int64)], "prompt 0"),
        ([torch.ones(3)], "int64"),
        ([torch.tensor([3, 20])], "token ids from 3 to 20 for a vocabulary of 20"),
        ([torch.tensor([-1])], "token ids from -1 to -1"),
        (torch.zeros(2, 3, dtype=torch.int64), "expected a list of them"),
    ):
        with pytest.raises(InputError, match=said):
            generate(model, bad, 3)
    with pytest.raises(ConfigError, match="new must be at least 1, got 0"):
        generate(model, prompts, 0)
    with pytest.raises(ConfigError, match="1 thresholds for 3 exits"):
        generate(model, prompts, 3, leave=ExitRule(SoftmaxGap(), (1.0,)))
    with CountMacs() as count:
        with pytest.raises(InputError, match="68 tokens in a network for 64; .* larger `longest`"):
            generate(model, prompts, 60)
    assert count.total == 0, "said before anything is computed"
    assert generate(model, prompts, 56).ids.shape == (4, 56)
    with pytest.raises(ConfigError, match="descending"):
        certify(model, prompts, 3, LearnedToken(16), [0.1, 0.5], risk=0.1, delta=0.1)
