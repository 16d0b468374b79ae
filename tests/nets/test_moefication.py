"""Blocks of neurons that belong together, and a router that ranks them."""

import pytest
import torch
from torch import nn

from dynanet.core.errors import ConfigError
from dynanet.nets.moefication import balanced_clusters, fit_router

D = 10


def test_clusters_are_balanced_and_find_groups_that_are_there():
    torch.manual_seed(0)
    truth = torch.arange(8).repeat(4)  # neuron i belongs to group i % 8
    weight = torch.eye(8)[truth] * torch.rand(32, 1).add(0.5) + 0.05 * torch.randn(32, 8)
    order = balanced_clusters(weight, 4)
    assert order.sort().values.tolist() == list(range(32))
    groups = truth[order].reshape(8, 4)
    together = (groups == groups.mode(1, keepdim=True).values).double().mean()
    assert together > 0.85  # by chance about 0.4
    assert torch.equal(order, balanced_clusters(weight, 4))


@pytest.mark.parametrize("block", [0, 4, 11])
def test_blocks_that_do_not_divide_the_neurons_are_refused(block):
    with pytest.raises(ConfigError, match=f"block must divide the 10 neurons, got {block}"):
        balanced_clusters(torch.randn(10, 3), block)


def test_fitting_lowers_the_loss():
    torch.manual_seed(0)
    x = torch.randn(300, D)
    losses = fit_router(nn.Linear(D, 4), x, x[:, :4].relu(), epochs=20)
    assert len(losses) == 20
    assert losses[-1] < 0.9 * losses[0]


def test_rows_without_activation_teach_nothing():
    torch.manual_seed(0)
    x, active = torch.randn(40, D), torch.rand(40, 4)
    routers = [nn.Linear(D, 4) for _ in range(2)]
    routers[1].load_state_dict(routers[0].state_dict())
    losses = fit_router(routers[0], x, active, epochs=3)
    silent = torch.cat([x, torch.randn(9, D)]), torch.cat([active, torch.zeros(9, 4)])
    assert fit_router(routers[1], *silent, epochs=3) == losses
    assert torch.equal(routers[0].weight, routers[1].weight)


def test_activations_that_teach_no_router_are_refused():
    with pytest.raises(ConfigError, match="5 inputs and activations of 4; expected as many"):
        fit_router(nn.Linear(D, 4), torch.randn(5, D), torch.ones(4, 4))
    with pytest.raises(ConfigError, match="no input activates"):
        fit_router(nn.Linear(D, 4), torch.randn(5, D), torch.zeros(5, 4))
