import math

import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import forced, record
from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.zoo import staged_resnet, static_resnet
from dynanet.zoo.reference import macs_per_exit


def test_the_practical_net_on_cifar():
    with torch.device("meta"):
        model = staged_resnet(num_classes=10, context=0)
    assert model.steps == 4
    assert macs_per_exit(model, (3, 32, 32))[-1] == pytest.approx(17.0e6, rel=1e-3)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.38e6, rel=0.02)


@pytest.mark.parametrize("context", [0, 32])
def test_macs_are_what_a_cost_model_measures(context, seeded, seeded_input):
    model, x = seeded(staged_resnet(num_classes=10, context=context)), seeded_input((2, 3, 32, 32))
    cost = CostModel(model, x[:1])
    with torch.no_grad(), record(model) as trace, forced(model, lambda decision: torch.ones_like(decision.keep)):
        model(x)
    assert cost.steps(trace)[0].tolist() == macs_per_exit(model, (3, 32, 32))


def test_exits_where_they_are_asked_for(seeded_input):
    x = seeded_input((2, 3, 32, 32))
    every, two = staged_resnet(num_classes=10, context=0), staged_resnet(num_classes=10, context=0, exits=(1, 3))
    assert len(two.answers(x)) == 2
    assert len(list(two.stages.parameters())) == len(list(every.stages.parameters()))
    saved = macs_per_exit(every, (3, 32, 32))[-1] - macs_per_exit(two, (3, 32, 32))[-1]
    assert saved == 32 * 10 + 64 * 10  # the linear layers of exits 0 and 2


def test_context_is_cheap_and_reads_the_layout_of_the_image(seeded):
    plain = macs_per_exit(staged_resnet(num_classes=10, context=0), (3, 32, 32))
    seeing = staged_resnet(num_classes=10, context=64)
    assert macs_per_exit(seeing, (3, 32, 32))[0] < 1.07 * plain[0]
    features = torch.randn(1, 32, 16, 16)
    leave = seeded(seeing.exits[0])
    assert not torch.allclose(leave(features), leave(features.roll(8, dims=3)), atol=1e-3)
    leave = seeded(staged_resnet(num_classes=10, context=0).exits[0])
    torch.testing.assert_close(leave(features), leave(features.roll(8, dims=3)))


@pytest.mark.parametrize("context", [0, 16])
@pytest.mark.parametrize("size", [(32, 32), (9, 9), (7, 20), (1, 1)])
def test_any_channels_classes_and_size(context, size):
    model = staged_resnet(num_classes=16, in_channels=200, widths=(8, 16, 32, 32), depths=(1, 1, 2, 1), context=context)
    answers = model.answers(torch.randn(2, 200, *size))
    assert [a.shape for a in answers] == [(2, 16)] * 5
    assert model.eval()(torch.zeros(0, 200, *size)).shape == (0, 16)


def test_the_static_net_is_the_same_backbone_with_the_last_exit(seeded_input):
    x = seeded_input((2, 3, 32, 32))
    dynamic, static = staged_resnet(num_classes=10).eval(), static_resnet(num_classes=10).eval()
    ours = [*dynamic.stages.state_dict().values(), *dynamic.exits[-1].state_dict().values()]
    theirs = static.state_dict()
    static.load_state_dict(dict(zip(theirs, ours, strict=True)))
    torch.testing.assert_close(static(x), dynamic.answers(x)[-1])


def test_the_width_multiplier_moves_macs_monotonically():
    macs = []
    for multiplier in (0.25, 0.5, 0.7, 1.0, 1.4):
        with torch.device("meta"):
            model, x = static_resnet(num_classes=10, width_multiplier=multiplier).eval(), torch.empty(1, 3, 32, 32)
        with CountMacs() as count:
            model(x)
        macs.append(count.total)
    assert macs == sorted(macs) and macs[1] < 0.3 * macs[3] and macs[4] > 1.8 * macs[3]


def test_he_initialisation():
    torch.manual_seed(0)
    model = staged_resnet(num_classes=10, context=64)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() >= 10_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        elif isinstance(module, nn.Linear):
            assert not module.bias.any()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"widths": (32, 64)}, "2 widths .* 3 depths"),
        ({"widths": (), "depths": ()}, "0 widths"),
        ({"depths": (1, 0, 1)}, r"depths must be at least 1, got \(1, 0, 1\)"),
        ({"stem_stride": 0}, "stem_stride must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"exits": (0, 1)}, "the last included"),
        ({"exits": (3, 1)}, "ascending"),
        ({"exits": ()}, "exits must be ascending"),
        ({"exits": "last"}, "exits must be ascending .* got 'last'"),
        ({"exits": (-1, 3)}, "exits must be ascending"),
        ({"context": -1}, "context must be at least 0, got -1"),
    ],
)
def test_what_means_no_network_is_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        staged_resnet(**{"num_classes": 10, **arguments})


def test_a_width_multiplier_of_zero_is_refused():
    with pytest.raises(ConfigError, match="width_multiplier must be above 0, got 0"):
        static_resnet(num_classes=10, width_multiplier=0)
