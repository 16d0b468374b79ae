"""Layers that something else may compute in their stead: of the exact type, without hooks or parametrizations."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

from dynanet.core.dynamic import execute
from dynanet.core.errors import StructureError
from dynanet.core.gate import Gate
from dynanet.core.plain import Watcher, check_plain, hooked, is_plain, is_sequential
from dynanet.gates.rules import Threshold, TopK
from dynanet.gates.scorers import ContextScorer, TileScorer
from dynanet.mechanisms.channel_gating import ChannelGating
from dynanet.mechanisms.experts import Experts, RouterScorer
from dynanet.mechanisms.neuron_skip import NeuronSkip, moefy
from dynanet.mechanisms.spatial_skip import SpatialSkip
from dynanet.ops.tiles import Tiles
from dynanet.session.session import Session

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*")


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=self.padding)


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Clipped(nn.ReLU):
    def forward(self, x):
        return x.clamp(0, 0.1)


class Named(nn.Conv2d):
    """Adds a constructor only."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)


class Doubling(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = 2 * layer(x)
        return x


def doubled(module, given, answer):
    return 2 * answer


def own_forward(layer):
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)
    return layer


def with_hook(layer):
    layer.register_forward_hook(doubled)
    return layer


def with_pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    return layer


def half_norm(layer):
    layer = weight_norm(layer)
    layer.weight_g.data.mul_(0.5)  # the weight itself follows at the next call
    return layer


CHANGES = {
    "a hook": with_hook,
    "a hook before": with_pre_hook,
    "a forward of its own": own_forward,
    "weight norm": half_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "a parametrization": parametrizations.spectral_norm,
}
EACH = pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def conv():
    return nn.Conv2d(4, 4, 3, padding=1)


def norm():
    layer = nn.BatchNorm2d(4)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


@EACH
def test_what_is_plain(change):
    assert is_plain(conv(), nn.Conv2d) and is_plain(Named(4), nn.Conv2d, nn.Linear)
    assert not is_plain(conv(), nn.Linear)
    assert not is_plain(Standardised(4, 4, 3), nn.Conv2d)
    changed = change(conv())
    assert not is_plain(changed, nn.Conv2d)
    with pytest.raises(StructureError, match="plain Conv2d"):
        check_plain(changed, nn.Conv2d)


def test_a_watcher_leaves_a_layer_plain():
    layer, seen = conv(), []
    layer.register_forward_pre_hook(Watcher(lambda args, kwargs: seen.append(args)), with_kwargs=True)
    assert is_plain(layer, nn.Conv2d) and not hooked(layer)
    layer(torch.randn(1, 4, 3, 3))
    assert len(seen) == 1


def test_sequentials():
    assert is_sequential(nn.Sequential()) and not is_sequential(Doubling()) and not is_sequential(conv())
    assert not is_sequential(own_forward(nn.Sequential()))


@torch.no_grad()
def answers_as_its_model(model, x):
    model.eval()
    torch.testing.assert_close(Session(model, x, engines="eager")(x), model(x), rtol=1e-4, atol=1e-4)


@EACH
@pytest.mark.parametrize("which", [0, 1])
def test_sessions_of_changed_layers(change, which):
    layers = [conv(), norm()]
    if which and change in (half_norm, CHANGES["a parametrization"]):
        pytest.skip("norms have no such weights")
    layers[which] = change(layers[which])
    answers_as_its_model(nn.Sequential(*layers), torch.randn(3, 4, 5, 5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(conv(), NormAct(4)),
        lambda: nn.Sequential(Standardised(4, 4, 3, padding=1), norm()),
        lambda: Doubling(conv(), norm()),
        lambda: own_forward(nn.Sequential(conv(), norm())),
        lambda: nn.Sequential(with_hook(nn.Sequential(conv(), norm()))),
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False)),
    ],
)
def test_sessions_of_subclasses(make):
    answers_as_its_model(make(), torch.randn(3, 4, 5, 5))


def test_plain_layers_are_folded():
    session = Session(nn.Sequential(Named(4), norm()), torch.randn(3, 4, 5, 5), engines="eager")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in session.model.module.modules())


@pytest.mark.parametrize("dilate", [False, True])
@pytest.mark.parametrize(
    "unit",
    [
        lambda: Standardised(4, 4, 3, padding=1),
        lambda: nn.Sequential(conv(), NormAct(4)),
        lambda: nn.Sequential(conv(), Clipped()),
        lambda: Doubling(conv()),
        *(lambda change=change: change(conv()) for change in CHANGES.values()),
    ],
)
def test_units_on_tiles_are_plain(unit, dilate):
    with pytest.raises(StructureError, match="plain|cannot run on tiles"):
        SpatialSkip(unit(), Gate(TileScorer(4, 4), Threshold(0.0)), Tiles(4, 1), dilate=dilate)


@torch.no_grad()
@pytest.mark.parametrize("dilate", [False, True])
def test_hooks_that_come_later_are_heard_or_refused(dilate):
    layer = SpatialSkip(
        nn.Sequential(conv(), nn.ReLU()), Gate(TileScorer(4, 4), Threshold(0.0)), Tiles(4, 1), dilate=dilate
    )
    layer = layer.eval().requires_grad_(False)
    x = torch.randn(2, 4, 9, 9)
    execute(layer, sparse=True)(x)
    with_hook(layer.branch[0])
    expected = execute(layer, sparse=False)(x)
    execute(layer, sparse=True)
    if dilate:
        with pytest.raises(StructureError, match="plain Conv2d"):
            layer(x)
    else:
        torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
@EACH
@pytest.mark.parametrize("which", ["local", "context"])
def test_scorers_call_what_is_not_plain(change, which):
    scorer = ContextScorer(4, 2).eval().requires_grad_(False)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    if which == "local":
        scorer.local[0] = change(scorer.local[0])
        local = scorer.local[0](x)
    else:
        scorer.context = change(scorer.context)
        local = scorer.local[0](x)
    context = scorer.context(x.mean((2, 3), keepdim=True))
    expected = F.avg_pool2d(local, 2).permute(0, 2, 3, 1) + context
    torch.testing.assert_close(scorer(x), expected, rtol=1e-4, atol=1e-4)


class Residual(nn.Module):
    """Has the children of an expert in two layers, and adds its input."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


def two_layers():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def changed_first(change):
    layers = two_layers()
    layers[0] = change(layers[0])
    return layers


@torch.no_grad()
@pytest.mark.parametrize(
    "expert",
    [
        Residual,
        two_layers,
        lambda: Doubling(*two_layers()),
        lambda: with_hook(two_layers()),
        lambda: own_forward(two_layers()),
        *(lambda change=change: changed_first(change) for change in CHANGES.values()),
    ],
)
def test_experts_that_are_not_plain_are_called(expert):
    layer = (
        Experts([expert() for _ in range(3)], Gate(RouterScorer(8, 3), TopK(2), units=3)).eval().requires_grad_(False)
    )
    x = torch.randn(5, 8)
    torch.testing.assert_close(execute(layer, sparse=True)(x), execute(layer, sparse=False)(x), rtol=1e-4, atol=1e-4)


@EACH
def test_weights_are_taken_from_plain_layers_only(change):
    linear = change(nn.Linear(8, 8))
    for taken in (
        lambda: NeuronSkip(linear, nn.Linear(8, 8), Gate(RouterScorer(8, 2), TopK(1), units=2), block=4),
        lambda: moefy(nn.Linear(8, 8), linear, torch.randn(9, 8), keep=1, block=4),
        lambda: ChannelGating(change(conv()), base=1),
    ):
        with pytest.raises(StructureError, match="plain"):
            taken()
