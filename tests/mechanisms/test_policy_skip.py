import pytest
import torch
from torch import nn

from dynanet.core.dynamic import record
from dynanet.core.errors import ConfigError, StructureError
from dynanet.core.gate import Gate
from dynanet.gates.rules import Bernoulli, Threshold
from dynanet.mechanisms.policy_skip import Bounded, PolicySkip, curriculum
from dynanet.session import Session
from dynanet.train.reinforce import surrogate


def policy_skip(rule=None, bound=1.0):
    torch.manual_seed(0)
    policy = Gate(Bounded(nn.Linear(4, 3), bound), rule or Threshold(), units=3)
    return PolicySkip(policy, [nn.Linear(6, 6) for _ in range(3)], before=nn.Linear(4, 6), after=nn.Linear(6, 2))


def test_one_look_at_the_input_decides_on_all_blocks():
    model, x = policy_skip().eval(), torch.randn(12, 4)
    with record(model) as trace:
        answer = model(x)
    (keep,) = trace[""]
    torch.testing.assert_close(keep, (model.policy.scorer.scorer(x) > 0).float())
    h = model.before(x)
    for k, block in enumerate(model.blocks):
        h = torch.where(keep[:, k : k + 1] > 0, block(h), h)
    torch.testing.assert_close(answer, model.after(h))


def test_blocks_that_are_held_run_and_teach_nothing():
    model, x = policy_skip(Bernoulli()).train(), torch.randn(64, 4)
    model.free = 1
    with record(model) as trace:
        model(x)
    (keep,) = trace[""]
    assert keep[:, :2].min() == 1 and 0 < keep[:, 2].mean() < 1
    surrogate(trace, torch.randn(64)).backward()
    gradient = model.policy.scorer.scorer.weight.grad
    assert not gradient[:2].any() and gradient[2].abs().sum() > 0


def test_the_curriculum_frees_the_last_block_first():
    model = policy_skip()
    step = curriculum(model, share=0.6)
    free = []
    for progress in (0.0, 0.1, 0.2, 0.41, 0.6, 1.0):
        step(progress)
        free.append(model.free)
    assert free == [1, 1, 2, 3, 3, 3]


def test_bounded_probabilities():
    score = torch.linspace(-60, 60, 13)[:, None]
    bounded = Bounded(nn.Identity(), 0.8).train()
    p = bounded(score).sigmoid()
    torch.testing.assert_close(p, 0.8 * score.sigmoid() + 0.2 * (1 - score.sigmoid()))
    assert p.min() >= 0.2 - 1e-6 and p.max() <= 0.8 + 1e-6
    assert torch.equal(bounded(score) > 1e-6, score > 0)  # what is likelier stays likelier
    assert torch.equal(bounded.eval()(score), score)


def test_what_does_not_fit_is_refused():
    gate = Gate(nn.Linear(4, 3), Threshold(), units=3)
    blocks = [nn.Linear(4, 4) for _ in range(3)]
    with pytest.raises(StructureError, match="3 units got 2 blocks"):
        PolicySkip(gate, blocks[:2])
    with pytest.raises(StructureError, match="and 1 shortcuts"):
        PolicySkip(gate, blocks, [nn.Identity()])
    with pytest.raises(StructureError, match="0 blocks"):
        PolicySkip(nn.Linear(4, 3), [])
    for bound in (0.5, 1.1):
        with pytest.raises(ConfigError, match="above 0.5"):
            Bounded(nn.Identity(), bound)
    with pytest.raises(ConfigError, match="share of 0"):
        curriculum(policy_skip(), share=0)


def test_in_a_session():
    model, x = policy_skip().eval(), torch.randn(9, 4)
    session = Session(model, x, engines="eager")
    with torch.no_grad():
        torch.testing.assert_close(session(x), model(x), rtol=1e-4, atol=1e-5)
