import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import execute, forced, record
from dynanet.core.errors import ConfigError
from dynanet.session import Session
from dynanet.testing import check_dynamic
from dynanet.zoo.ranets import Dense, Fuse, Stage, ranet, ranet_cifar, ranet_imagenet
from dynanet.zoo.reference import macs_per_exit, paper_flops

# Parameters, and millions per exit: the authors' counter ("F") and convolutions and linears alone ("M"). Measured on
# github.com/yangle15/RANet-pytorch and the configurations of github.com/SHI-Labs/Boosted-Dynamic-Networks.
PUBLISHED = {
    "CIFAR-10, script": (lambda: ranet_cifar(num_classes=10), 32, "3.261830",
        "15.81 31.28 44.66 50.36 60.65 63.65 90.17 94.90",
        "15.738 31.173 44.462 50.153 60.315 63.302 89.523 94.247"),
    "CIFAR-100, script": (lambda: ranet_cifar(num_classes=100), 32, "3.3547",
        "15.83 31.31 44.69 50.40 60.71 63.72 90.26 95.00", None),
    "CIFAR-10, model 1": (lambda: ranet_cifar(num_classes=10, variant="model1"), 32, "2.547601",
        "8.36 21.77 32.84 41.52 53.23 58.92",
        "8.316 21.687 32.696 41.354 52.925 58.608"),
    "CIFAR-100, model 2": (lambda: ranet_cifar(num_classes=100, variant="model2"), 32, "5.1870",
        "10.74 24.16 35.25 43.94 93.07 114.68 164.02 175.74", None),
    "CIFAR-100, model 3": (lambda: ranet_cifar(num_classes=100, variant="model3"), 32, "4.0606",
        "10.75 24.16 35.25 43.95 55.66 61.37 105.64 117.36", None),
    "ImageNet, model 1": (lambda: ranet_imagenet(variant="model1"), 224, "131.123991",
        "246.47 631.16 860.40 1041.14 1869.85 2160.38 2734.28 2828.31", None),
    "ImageNet, model 2": (lambda: ranet_imagenet(), 224, "149.144186",
        "434.97 888.67 1153.36 1352.45 2279.91 2588.47 3235.52 3333.48", None),
    "ImageNet, script": (lambda: ranet_imagenet(variant="script"), 224, "87.97",
        "168.07 520.47 731.89 903.79 1052.25 1118.80 1589.01 1680.98", None),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_counts_are_the_published_ones(name):
    build, size, parameters, flops, macs = PUBLISHED[name]
    with torch.device("meta" if size == 224 else "cpu"):
        model = build()
    assert as_printed([sum(p.numel() for p in model.parameters())], like=parameters) == parameters
    assert as_printed(paper_flops(model, (3, size, size)), like=flops) == flops
    if macs is not None:
        assert as_printed(macs_per_exit(model, (3, size, size)), like=macs) == macs


def as_printed(counts, like: str) -> str:
    digits = len(like.split()[0].split(".")[1])
    return " ".join(f"{count / 1e6:.{digits}f}" for count in counts)


def tiny(**changes):
    settings = {"num_classes": 4, "blocks": 1, "block_step": 1, "step": 2, "channels": 2, "growth": 4}
    settings |= {"scales": (1, 2, 2), "growth_factors": (2, 1, 1), "bottleneck_factors": (2, 1, 1)}
    return ranet(**(settings | changes))


def test_the_laws(seeded):
    check_dynamic(seeded(tiny()), torch.randn(3, 3, 8, 8))


def test_sub_networks_and_exits():
    model = ranet_cifar(num_classes=10, variant="model1")
    assert [(s.subnet, s.place, len(s.blocks), s.opens) for s in model.stages if isinstance(s, Stage)] == [
        (0, 0, 1, True), (0, 1, 1, False), (1, 0, 3, True), (1, 3, 1, False), (2, 0, 5, True), (2, 5, 1, False)
    ]  # fmt: skip
    depths = [[len(b.layers) for b in s.blocks if isinstance(b, Dense | Fuse)] for s in model.stages]
    assert depths == [[2], [4], [2, 4, 6], [8], [2, 4, 6, 8, 10], [12]]
    fused = [[b.shrinks for b in s.blocks if isinstance(b, Fuse)] for s in model.stages]
    assert fused == [[], [], [False, True], [], [False, True, False, True], []]


TRANSITION_AT_AN_EXIT = {"blocks": 2, "scales": (2, 3), "growth_factors": (2, 1), "bottleneck_factors": (2, 1)}


@pytest.mark.parametrize("changes", [{}, TRANSITION_AT_AN_EXIT])
def test_samples_really_leave(changes, seeded, seeded_input):
    """Samples that leave at the first exit, in the second sub-network, and last get what they would get alone."""
    model, x = seeded(tiny(**changes)), seeded_input((5, 3, 17, 14))
    should_continue = iter([[1, 0, 1, 1, 0], [1, 0, 1]])  # the second decision: what is asked of those who arrived

    def leave(decision: Decision) -> torch.Tensor:
        return torch.tensor(next(should_continue), dtype=torch.float32)[:, None]

    with torch.no_grad():
        first, second, last = model.answers(x)
        with forced(execute(model, sparse=True), leave):
            sparse = model(x)
    torch.testing.assert_close(sparse, torch.stack([last[0], first[1], second[2], last[3], first[4]]))


def test_macs_are_what_a_cost_model_measures(seeded, seeded_input):
    model, x = seeded(tiny()), seeded_input((2, 3, 32, 32))
    cost = CostModel(model, x[:1])
    with torch.no_grad(), record(model) as trace, forced(model, lambda decision: torch.ones_like(decision.keep)):
        model(x)
    macs = macs_per_exit(model, (3, 32, 32))
    assert cost.steps(trace)[0].tolist() == macs
    assert cost.full == macs[-1]


def test_in_a_session(seeded, seeded_input):
    """An engine per exit, which later sub-networks run only for the samples that go on."""
    pytest.importorskip("onnxruntime")
    model, x = seeded(tiny()), seeded_input((6, 3, 16, 16))
    with torch.no_grad(), record(model) as trace:
        model(x)
    for k, call in enumerate(trace.calls):  # half of them leave at the first exit, and two more at the second
        least = call.decision.score.flatten().sort().values
        model.thresholds[k] = (least[2] + least[3]) / 2 if k == 0 else (least[0] + least[1]) / 2
    with torch.no_grad(), record(model) as trace:
        dense = model(x)
    arrive = [6, *(int(call.keep.sum()) for call in trace.calls)]
    session = Session(model, x, engines="onnxruntime", batches=(8,))
    assert len(session.engines()) == 3
    met = []
    for engine in session.engines():
        engine.listener = lambda inputs: met.append(inputs[0].shape[0])
    torch.testing.assert_close(session(x), dense, rtol=1e-4, atol=1e-4)
    assert met == [n for n in arrive if n] and met[:2] == [6, 3]


@pytest.mark.parametrize("head, size", [("cifar", (7, 20)), ("cifar", (1, 1)), ("imagenet", (33, 50))])
def test_any_channels_classes_and_size(head, size):
    model = tiny(num_classes=16, in_channels=200, head=head)
    answers = model.answers(torch.randn(2, 200, *size))
    assert [a.shape for a in answers] == [(2, 16)] * 3
    assert model.eval()(torch.zeros(0, 200, *size)).shape == (0, 16)


def test_gradients_reach_every_parameter():
    model = tiny()
    sum(answer.square().mean() for answer in model.answers(torch.randn(4, 3, 32, 32))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_rows_that_go_on_are_gathered_once(seeded, seeded_input):
    """No tensor stands twice in what travels between exits, and the last sub-network remembers nothing."""
    model, state = seeded(ranet_cifar(num_classes=10)), seeded_input((1, 3, 32, 32))
    for stage in model.stages:
        state = stage(state)
        tensors = [*state[0], *(t for features in state[1] for t in features), *state[2]]
        assert len({id(t) for t in tensors}) == len(tensors)
    assert [len(part) for part in state] == [0, 0, 1]


def test_he_initialisation():
    torch.manual_seed(0)
    for module in ranet_cifar(num_classes=10).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() >= 10_000:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"scales": (1, 2)}, "2 scales, 3 growth_factors and 3 bottleneck_factors"),
        ({"scales": (), "growth_factors": (), "bottleneck_factors": ()}, "0 scales"),
        ({"scales": (1, 0, 2)}, r"scales must be at least 1, got \(1, 0, 2\)"),
        ({"growth_factors": (2, 1.5, 1)}, r"growth_factors must be a whole number of at least 1, got \(2, 1.5, 1\)"),
        ({"step_mode": "lg"}, "step_mode must be one of 'even', 'lin_grow', got 'lg'"),
        ({"head": "ImageNet"}, "head must be .* got 'ImageNet'"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"block_step": True}, "block_step must be a whole number of at least 1, got True"),
        ({"compress": 1.0}, "compress must be .* got 1.0"),
        ({"compress": 0.1}, "growth \\* factor \\* compress of at least 1"),
        ({"reduction": 0}, "reduction must be .* got 0"),
        ({"reduction": 0.01}, "channels_after_reduction must be at least 1, got 0"),
    ],
)
def test_what_means_no_network_is_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        tiny(**arguments)


def test_unknown_variants_are_refused():
    with pytest.raises(ConfigError, match="variant must be one of 'even', 'model1', .* got 'model4'"):
        ranet_cifar(num_classes=10, variant="model4")
    with pytest.raises(ConfigError, match="variant must be one of 'model1', .* got 'even'"):
        ranet_imagenet(variant="even")
