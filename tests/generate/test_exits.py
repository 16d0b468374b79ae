"""Generation with exits: rows leave apart, memories are what they are called, promises hold."""

import pytest
import torch

from dynanet.core.errors import ConfigError, InputError
from dynanet.core.macs import CountMacs
from dynanet.generate.exits import CopyState, ExitRule, PendingTokens, Recompute, certify, generate
from dynanet.generate.speculative import speculate
from dynanet.generate.token_confidence import LearnedToken, SoftmaxGap
from dynanet.ops.decoding import prefilled
from dynanet.zoo.causal_transformers import causal_transformer

NEW = 14


@pytest.fixture(scope="module")
def model():
    """In float64, so that sums in another order do not change which token is likeliest."""
    torch.manual_seed(0)
    model = causal_transformer(
        vocabulary=20, width=16, heads=2, hidden=32, depth=5, exits=(0, 2, 4), longest=64, layer_dropout=0.2
    )
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model.double().eval()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(20, (length,), generator=generator) for length in (3, 1, 9, 5)]


@pytest.fixture(scope="module")
def whole(model, prompts):
    """Greedy, without any cache: the whole text again for every token."""
    return torch.stack([step_by_step(model, prompt)[0] for prompt in prompts])


def step_by_step(model, prompt, leave=None):
    ids, exits = prompt[None], []
    for _ in range(NEW):
        with torch.no_grad():
            found = model.features(ids)
            for number, (x, before) in enumerate(found):
                logits = model.logits(number, x[:, -1])
                sure = leave is not None and number + 1 < len(found)
                if sure and leave.confidence(logits, x[:, -1], before[:, -1]) >= leave.thresholds[number]:
                    break
        ids = torch.cat([ids, logits.argmax(-1)[None]], 1)
        exits.append(number)
    return ids[0, len(prompt) :], torch.tensor(exits)


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


@pytest.mark.parametrize("exit", [0, 1])
@pytest.mark.parametrize("draft", [1, 4])
def test_self_speculation_is_the_whole_model_token_for_token(exit, draft, model, prompts, whole):
    found = speculate(model, prompts, NEW, exit=exit, draft=draft)
    assert torch.equal(found.ids, whole)
    assert 0 <= found.accepted <= found.drafted and found.passes <= NEW


def test_good_drafts_save_passes(model, prompts):
    """A model whose layers after the first do nothing drafts without a mistake."""
    import copy

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
        with pytest.raises(InputError, match=said):
            speculate(model, bad, 3)
    with pytest.raises(ConfigError, match="new is 0"):
        generate(model, prompts, 0)
    with pytest.raises(ConfigError, match="1 thresholds for 3 exits"):
        generate(model, prompts, 3, leave=ExitRule(SoftmaxGap(), (1.0,)))
    with CountMacs() as count:
        with pytest.raises(InputError, match="68 tokens in a network for 64; .* larger `longest`"):
            generate(model, prompts, 60)
        with pytest.raises(InputError, match="68 tokens in a network for 64; prompt, new tokens and drafts"):
            speculate(model, prompts, 56, draft=4)
    assert count.total == 0, "said before anything is computed"
    assert generate(model, prompts, 56).ids.shape == (4, 56) and speculate(model, prompts, 52).ids.shape == (4, 52)
    for exit, draft in ((2, 4), (0, 0)):
        with pytest.raises(ConfigError, match="exit"):
            speculate(model, prompts, 3, exit=exit, draft=draft)
    with pytest.raises(ConfigError, match="descending"):
        certify(model, prompts, 3, LearnedToken(16), [0.1, 0.5], risk=0.1, delta=0.1)
