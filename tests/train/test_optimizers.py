"""Only kernels decay, and learning rates end where their schedule says."""

from functools import partial

import pytest
import torch
from torch import nn

from dynanet.core.errors import ConfigError
from dynanet.train.optimizers import adamw, cosine, one_cycle, sgd


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))


def rates(optimizer, scheduler, steps):
    made, found = scheduler(optimizer, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return found


@pytest.mark.parametrize("factory", [partial(sgd, momentum=0.0), adamw], ids=["sgd", "adamw"])
def test_without_gradients_kernels_shrink_and_vectors_stay(factory):
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    factory(0.1, weight_decay=0.5)(model).step()
    for name, p in model.named_parameters():
        expected = before[name] * (0.95 if p.dim() > 1 else 1)
        torch.testing.assert_close(p.detach(), expected, msg=name)


@pytest.mark.parametrize("factory", [sgd, adamw])
def test_frozen_weights_are_no_business_of_the_optimizer(factory):
    model = net()
    model[0].requires_grad_(False)
    held = [p for group in factory()(model).param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    model.requires_grad_(False)
    model[3].bias.requires_grad_(True)
    assert len(factory()(model).param_groups) == 1


def test_one_cycle_rises_to_the_learning_rate_and_falls_to_nearly_nothing():
    found = rates(sgd(0.5)(net()), one_cycle(warmup=0.25), 40)
    top = max(found)
    assert top == pytest.approx(0.5) and found[0] == pytest.approx(0.5 / 25) and found[-1] < 1e-4
    at = found.index(top)
    assert at in (9, 10)
    assert found[: at + 1] == sorted(found[: at + 1]) and found[at:] == sorted(found[at:], reverse=True)


def test_a_cosine_falls_from_the_learning_rate_to_nothing():
    found = rates(sgd(0.5)(net()), cosine(), 11)
    assert found[0] == 0.5 and found == sorted(found, reverse=True)
    assert found[5] + found[6] == pytest.approx(0.5), "symmetric about its middle"


def test_a_warm_up_comes_before_the_whole_cosine():
    found = rates(sgd(0.5)(net()), cosine(warmup_steps=4), 15)
    assert found[:4] == sorted(found[:4]) and found[0] < 0.01
    assert found[4:] == pytest.approx(rates(sgd(0.5)(net()), cosine(), 11))


@pytest.mark.parametrize("steps", [3, 4])
def test_a_warm_up_as_long_as_the_run_is_refused(steps):
    with pytest.raises(ConfigError, match=f"4 warm-up steps in a run of {steps}"):
        cosine(warmup_steps=4)(sgd()(net()), steps)
