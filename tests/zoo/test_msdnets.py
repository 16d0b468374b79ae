import math

import pytest
import torch
from torch import nn

import dynanet.zoo as zoo
from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError
from dynanet.zoo.msdnets import Layer, Transition, msdnet, msdnet_anytime, msdnet_imagenet
from dynanet.zoo.reference import macs_per_exit, paper_flops

# Parameters, and millions per exit as the authors' code gives them: their counter ("F") and convolutions and linears
# alone ("M"). Measured on github.com/kalviny/MSDNet-PyTorch; the last row is also what issue 10 there reports.
PUBLISHED = {
    "anytime, 7 blocks": (lambda: msdnet_anytime(num_classes=100), 32, "3.067960",
        "15.14 25.51 37.10 46.33 57.34 66.96 75.94",
        "14.967 25.259 36.781 45.972 56.934 66.529 75.488"),
    "anytime, 10 blocks": (lambda: msdnet_anytime(num_classes=100, blocks=10), 32, "4.955644",
        "15.14 25.51 37.79 52.06 62.18 74.07 87.73 100.04 110.12 121.68",
        "14.967 25.259 37.468 51.668 61.745 73.591 87.206 99.484 109.548 121.087"),
    "anytime, 10 blocks, CIFAR-10": (lambda: msdnet_anytime(num_classes=10, blocks=10), 32, "4.8395",
        "15.13 25.48 37.75 52.02 62.12 74.00 87.65 99.95 110.02 121.56", None),
    "budgeted, 5 blocks": (lambda: msdnet(num_classes=100), 32, "2.078924",
        "6.86 14.35 27.54 41.71 58.48",
        "6.793 14.209 27.279 41.374 58.088"),
    "budgeted, 7 blocks": (lambda: msdnet(num_classes=100, blocks=7), 32, "3.966664",
        "6.86 14.35 27.29 48.45 76.43 108.85 137.28",
        "6.793 14.209 27.041 48.054 75.900 108.192 136.565"),
    "budgeted, 8 blocks": (lambda: msdnet(num_classes=100, blocks=8), 32, "5.3106",
        "6.86 14.35 27.29 48.45 81.57 112.64 152.92 192.69", None),
    "ImageNet, step 4": (lambda: msdnet_imagenet(step=4), 224, "23.958440",
        "339.90 685.46 1008.16 1254.47 1360.53",
        "337.214 681.654 1003.659 1249.626 1355.606"),
    "ImageNet, step 6": (lambda: msdnet_imagenet(step=6), 224, "56.529304",
        "514.66 1171.18 1844.52 2501.40 2742.06",
        "511.324 1166.145 1838.349 2494.631 2735.132"),
    "ImageNet, step 7": (lambda: msdnet_imagenet(step=7), 224, "62.314472",
        "615.69 1436.39 2283.21 2967.42 3253.79",
        "612.031 1430.810 2276.388 2959.942 3246.181"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_counts_are_the_published_ones(name):
    build, size, parameters, flops, macs = PUBLISHED[name]
    with torch.device("meta" if size == 224 else "cpu"):
        model = build()
    assert as_printed([parameter_count(model)], like=parameters) == parameters
    assert as_printed(paper_flops(model, (3, size, size)), like=flops) == flops
    if macs is not None:
        assert as_printed(macs_per_exit(model, (3, size, size)), like=macs) == macs


def test_parameters_up_to_each_exit_of_the_released_checkpoint():
    with torch.device("meta"):
        model = msdnet_imagenet(step=7)
    steps = zip(model.stages, model.exits, strict=True)
    per_step = [parameter_count(stage) + parameter_count(leave) for stage, leave in steps]
    upto = [sum(per_step[: k + 1]) for k in range(5)]
    assert as_printed(upto, like="8.76") == "8.76 20.15 31.73 41.86 62.31"


def as_printed(counts, like: str) -> str:
    digits = len(like.split()[0].split(".")[1])
    return " ".join(f"{count / 1e6:.{digits}f}" for count in counts)


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_macs_are_what_a_cost_model_measures(seeded, seeded_input):
    model, x = seeded(msdnet(num_classes=10, blocks=3)), seeded_input((2, 3, 32, 32))
    cost = CostModel(model, x[:1])
    with torch.no_grad(), record(model) as trace, forced(model, lambda decision: torch.ones_like(decision.keep)):
        model(x)
    macs = macs_per_exit(model, (3, 32, 32))
    assert cost.steps(trace)[0].tolist() == macs
    assert cost.full == macs[-1]


def test_samples_really_leave(seeded, seeded_input):
    """Sparse and dense agree when some samples leave at the first exit, some at the second, and some at the last."""
    model, x = seeded(msdnet(num_classes=10, blocks=3)), seeded_input((5, 3, 32, 32))
    should_continue = iter([[1, 0, 1, 1, 0], [1, 0, 1]])  # the second decision: what is asked of those who arrived

    def leave(decision: Decision) -> torch.Tensor:
        return torch.tensor(next(should_continue), dtype=torch.float32)[:, None]

    with torch.no_grad():
        first, second, last = model.answers(x)
        with forced(execute(model, sparse=True), leave):
            sparse = model(x)
    torch.testing.assert_close(sparse, torch.stack([last[0], first[1], second[2], last[3], first[4]]))


def test_he_initialisation():
    torch.manual_seed(0)
    model = msdnet_imagenet(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if module.weight.numel() >= 10_000:
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any()
        elif isinstance(module, nn.Linear):
            assert not module.bias.any()


def test_blocks_grow_by_step_mode():
    assert layers_per_block(msdnet(num_classes=2, blocks=4, base=3, step=2, step_mode="even")) == [3, 2, 2, 2]
    assert layers_per_block(msdnet(num_classes=2, blocks=4, base=3, step=2, step_mode="lin_grow")) == [3, 3, 5, 7]


def layers_per_block(model) -> list[int]:
    return [sum(isinstance(layer, Layer) for layer in stage) for stage in model.stages]


def scales_per_layer(model) -> list[int]:
    return [len(layer.scales) for stage in model.stages for layer in stage if isinstance(layer, Layer)]


def narrowing_layers(model) -> list[int]:
    """After how many layers a transition stands."""
    layers = [layer for stage in model.stages for layer in stage if isinstance(layer, Layer | Transition)]
    places = [i for i, layer in enumerate(layers) if isinstance(layer, Transition)]
    return [place - n for n, place in enumerate(places)]


def test_when_scales_end():
    nine = {"num_classes": 2, "blocks": 3, "base": 3, "step": 3, "step_mode": "even"}
    assert scales_per_layer(msdnet(**nine, prune="max")) == [3, 3, 3, 2, 2, 2, 1, 1, 1]
    assert scales_per_layer(msdnet(**nine, prune="min")) == [3, 3, 3, 3, 3, 3, 3, 2, 1]
    assert narrowing_layers(msdnet(**nine, prune="max")) == [4, 7]
    assert narrowing_layers(msdnet(**nine, prune="min")) == [3, 6]
    assert narrowing_layers(msdnet(**nine, reduction=0)) == []


@pytest.mark.parametrize("prune", ["max", "min"])
@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (9, 9), (7, 20), (1, 1)])
def test_any_channels_classes_and_size(prune, bottleneck, size):
    model = msdnet(num_classes=16, in_channels=200, blocks=3, prune=prune, bottleneck=bottleneck, growth=5)
    answers = model.answers(torch.randn(2, 200, *size))
    assert [a.shape for a in answers] == [(2, 16)] * 3
    assert model.eval()(torch.zeros(0, 200, *size)).shape == (0, 16)


def test_gradients_reach_every_parameter_of_an_exit_and_what_lies_before_it():
    model = msdnet(num_classes=4, blocks=2)
    sum(answer.square().mean() for answer in model.answers(torch.randn(4, 3, 32, 32))).backward()
    unread = [name for name, p in model.named_parameters() if p.grad is None]
    # 3 layers, one scale dropped per layer: the last one reads two scales and keeps one; everything is read.
    assert unread == []


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"growth_factors": (1, 2)}, "2 growth_factors .* 3 bottleneck_factors"),
        ({"growth_factors": (), "bottleneck_factors": ()}, "0 growth_factors"),
        ({"growth_factors": (1, 0, 4)}, r"growth_factors must be at least 1, got \(1, 0, 4\)"),
        ({"step_mode": "linear"}, "step_mode must be one of 'even', 'lin_grow', got 'linear'"),
        ({"prune": "none"}, "prune must be one of 'max', 'min', got 'none'"),
        ({"head": "ImageNet"}, "head must be one of 'cifar', 'imagenet', got 'ImageNet'"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"channels": 16.0}, "channels must be a whole number of at least 1, got 16.0"),
        ({"num_classes": True}, "num_classes must be a whole number of at least 1, got True"),
        ({"step": 0, "step_mode": "even"}, "at least one layer in each"),
        ({"reduction": 1.5}, "reduction must be .* got 1.5"),
        ({"reduction": "half"}, "reduction must be .* got 'half'"),
        ({"reduction": 0.001}, "channels_after_reduction must be at least 1, got 0"),
        ({"growth": 1, "growth_factors": (1, 1, 1)}, "growth 1 with growth_factors"),
        ({"blocks": 1, "prune": "min"}, "1 layers for 3 scales"),
    ],
)
def test_what_means_no_network_is_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        msdnet(**{"num_classes": 10, **arguments})


def test_the_list_of_models():
    assert all(callable(getattr(zoo, name)) for name in zoo.__all__)
    assert "load_reference" in zoo.__all__
