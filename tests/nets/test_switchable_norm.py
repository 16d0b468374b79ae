import copy

import pytest
import torch
from torch import nn

from dynanet.core.errors import ConfigError
from dynanet.nets.switchable_norm import norms_apart


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)), nn.Flatten(1, 2)
    )


def of_norms(view):
    return {id(p) for m in view.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}


def check_shared(views):
    for view in views[1:]:
        own = {id(p) for p in view.parameters()} - {id(p) for p in views[0].parameters()}
        assert own == of_norms(view) and len(own) == 4


def test_all_is_shared_but_the_norms():
    first = net()
    views = norms_apart(first, 3)
    assert views[0] is first and len(views) == 3
    check_shared(views)
    assert len(list(views.parameters())) == 4 + 3 * 4  # as an optimizer sees them


@pytest.mark.parametrize("change", [copy.deepcopy, nn.Module.double, lambda m: m.to(memory_format=torch.channels_last)])
def test_it_stays_so(change):
    check_shared(change(norms_apart(net(), 3)))


def test_views_start_alike_and_gather_statistics_of_their_own():
    views, x = norms_apart(net(), 2).train(), torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(views[0](x), views[1](x))
    for _ in range(20):
        views[1](5 * x + 1)
    views.eval()
    assert not torch.allclose(views[0](x), views[1](x))
    assert views[1][1].running_var.mean() > 5 * views[0][1].running_var.mean()


def test_what_trains_one_trains_the_weights_of_all():
    views, x = norms_apart(net(), 2), torch.randn(4, 3, 6, 6)
    optimizer = torch.optim.SGD(views.parameters(), 0.1)
    before = views[0][0].weight.clone(), views[0][1].weight.clone()
    views[1](x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(views[0][0].weight, before[0]) and views[0][0].weight is views[1][0].weight
    assert torch.equal(views[0][1].weight, before[1]) and not torch.equal(views[1][1].weight, before[1])


def test_a_state_dict_brings_all_of_it_back():
    views, other = norms_apart(net(), 2), norms_apart(net(), 2)
    views[1][1].running_mean.add_(1.0)
    other.load_state_dict(views.state_dict())
    check_shared(other)
    for ours, theirs in zip(views.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_no_view_is_refused(count):
    with pytest.raises(ConfigError, match="count must be"):
        norms_apart(net(), count)
