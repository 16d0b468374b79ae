import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import forced, record
from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.mechanisms.policy_skip import curriculum
from dynanet.nets.resnet import cifar_resnet
from dynanet.testing import check_equal, check_neighbours
from dynanet.train.reinforce import DropReward, deployed_reward, surrogate
from dynanet.zoo import blockdrop
from dynanet.zoo.blockdrop_nets import load_static

SMALL = {"num_classes": 10, "depth": 14, "widths": (4, 8, 8)}


def test_the_laws_of_the_whole_net(seeded, seeded_input):
    model, x = seeded(blockdrop(**SMALL)), seeded_input((3, 3, 16, 16))
    check_equal(model, x, draws=2)
    check_neighbours(model, x)


def test_the_published_flops():
    """54 blocks; 16.9 of them on average come to 1.81e8 floating point operations, two per multiply-accumulate, with
    the policy (the authors' table for CIFAR-10). Which blocks those were is not published; they differ in price.
    """
    torch.manual_seed(0)
    cost = CostModel(blockdrop(num_classes=10).eval(), torch.zeros(1, 3, 32, 32))
    prices = cost.unit[""]
    assert len(prices) == 54
    assert 2 * (cost.always + 16.9 * prices.mean()) == pytest.approx(1.81e8, rel=0.02)


def test_a_pretrained_resnet_goes_in(seeded, seeded_input):
    static, x = seeded(cifar_resnet(**SMALL)), seeded_input((2, 3, 16, 16))
    model = load_static(blockdrop(**SMALL).eval(), static)
    with torch.no_grad(), forced(model, lambda d: torch.ones_like(d.keep)):
        torch.testing.assert_close(model(x), static(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_static(model, cifar_resnet(**{**SMALL, "widths": (4, 4, 8)}))


def test_a_step_of_the_papers_training(seeded, seeded_input):
    """The policy alone, self-critical, with a curriculum; nothing else changes."""
    model, x = seeded(blockdrop(**SMALL)), seeded_input((16, 3, 16, 16))
    y, reward = torch.arange(16) % 10, DropReward(1.0)
    curriculum(model)(0.2)
    assert model.free == 3
    model.policy.train()
    model.training = True
    nn.Module.requires_grad_(model.blocks, False)
    with record(model) as trace:
        answer = model(x)
    (keep,) = trace[""]
    assert keep[:, :3].min() == 1 and 0 < keep[:, 3:].mean() < 1
    loss = surrogate(trace, reward(answer, y, trace) - deployed_reward(model, x, y, reward))
    loss.backward()
    assert model.policy.scorer.scorer[-1][-1].weight.grad[3:].abs().sum() > 0
    assert all(p.grad is None for p in [*model.blocks.parameters(), *model.after.parameters()])


def test_the_policy_is_cheap():
    with torch.device("meta"):
        model, x = blockdrop(num_classes=10).eval(), torch.empty(1, 3, 32, 32)
    with CountMacs() as all_of_it:
        model(x)
    with CountMacs() as policy:
        model.policy(x)
    assert policy.total < 0.05 * all_of_it.total


def test_what_means_no_network_is_refused():
    with pytest.raises(ConfigError, match="6n"):
        blockdrop(num_classes=10, policy_depth=10)
    with pytest.raises(ConfigError, match="got 0.3"):
        blockdrop(num_classes=10, bound=0.3)
