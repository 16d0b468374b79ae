import pytest
import torch

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, forced, record
from dynanet.core.errors import ConfigError, InputError
from dynanet.session import Session
from dynanet.testing import check_dynamic
from dynanet.zoo.reference import macs_per_exit
from dynanet.zoo.vit import vit_exits, vit_static

TINY = {"num_classes": 3, "in_channels": 2, "size": 8, "patch": 4, "width": 8, "depth": 3, "heads": 2, "exits": (0, 2)}


def macs(width, tokens, expansion):
    return tokens * (4 + 2 * expansion) * width**2 + 2 * tokens**2 * width


def test_macs_counted_by_hand_and_by_a_cost_model():
    model = vit_exits(num_classes=10)
    stem = 256 * 27 * 48 + 64 * 9 * 48 * 96 + 64 * 96 * 96
    steps = [stem + 2 * n * macs(96, 64, 2) + n * 960 for n in (1, 2, 3)]
    assert macs_per_exit(model, (3, 32, 32)) == steps
    x = torch.randn(2, 3, 32, 32)
    cost = CostModel(model, x[:1])
    with torch.no_grad(), record(model.eval()) as trace, forced(model, everything):
        model(x)
    assert cost.steps(trace)[0].tolist() == steps
    assert 36e6 < steps[-1] < 37e6


def test_it_keeps_the_laws():
    torch.manual_seed(0)
    model = vit_exits(**TINY)
    model.thresholds.fill_(-0.6)
    check_dynamic(model, torch.randn(5, 2, 8, 8), draws=2)


def test_a_session_runs_it():
    torch.manual_seed(0)
    model, x = vit_exits(**TINY).eval(), torch.randn(20, 2, 8, 8)
    with torch.no_grad():
        model.thresholds.copy_(model.confidence(model.answers(x)[0]).quantile(0.51))
    session = Session(model, x, engines="onnxruntime", threads=1, batches=(8,))
    with torch.no_grad(), record(session) as trace:
        torch.testing.assert_close(session(x), model(x), rtol=1e-4, atol=1e-5)
    assert 0 < trace[""][0].mean() < 1


def test_the_static_net_is_the_same_backbone_with_the_last_exit():
    torch.manual_seed(0)
    arguments = {k: v for k, v in TINY.items() if k != "exits"}
    dynamic, static, x = vit_exits(**TINY).eval(), vit_static(**arguments).eval(), torch.randn(2, 2, 8, 8)
    ours = [*dynamic.stages.state_dict().values(), *dynamic.exits[-1].state_dict().values()]
    static.load_state_dict(dict(zip(static.state_dict(), ours, strict=True)))
    torch.testing.assert_close(static(x), dynamic.answers(x)[-1])


def test_every_token_counts_and_so_does_its_place():
    torch.manual_seed(0)
    model, x = vit_exits(**TINY).eval(), torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        answer, moved = model(x), model(x.roll(4, -1))
        for row in range(0, 8, 4):
            for column in range(0, 8, 4):
                other = x.clone()
                other[:, :, row : row + 4, column : column + 4] += 1
                assert not torch.allclose(model(other), answer, atol=1e-4)
    assert not torch.allclose(moved, answer, atol=1e-5)


def test_another_size_is_refused():
    model = vit_exits(**TINY)
    for shape in ((1, 2, 8, 12), (1, 3, 8, 8)):
        with pytest.raises(InputError, match="resize"):
            model(torch.zeros(shape))
    assert model.eval()(torch.zeros(0, 2, 8, 8)).shape == (0, 3)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"heads": 3}, "width must be a multiple of heads = 3, got 8"),
        ({"size": 9, "patch": 3}, "patch must be a power of two, got 3"),
        ({"patch": 16}, "size must be a multiple of patch = 16"),
        ({"exits": (0, 1)}, "last"),
        ({"exits": (2, 0)}, "ascending"),
        ({"exits": ()}, "exits must be"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"num_classes": True}, "num_classes must be a whole number of at least 1, got True"),
    ],
)
def test_what_means_no_network_is_refused(wrong, says):
    with pytest.raises(ConfigError, match=says):
        vit_exits(**{**TINY, **wrong})
