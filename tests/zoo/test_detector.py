import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import everything, execute, forced, layers, record
from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.mechanisms.position_halting import PositionHalting, PositionPonderCost, steps_taken
from dynanet.tasks.detection.decoding import decode
from dynanet.tasks.detection.loss import DetectionLoss
from dynanet.testing import check_dynamic, check_equal, check_neighbours
from dynanet.zoo import detector_halting, detector_skip, detector_static

SMALL = {"num_classes": 3, "widths": (4, 6, 8), "depths": (1, 2), "head": 6}


@pytest.fixture
def halting(seeded):
    """Positions leave after any number of units."""
    model = seeded(detector_halting(**SMALL))
    for stage in layers(model).values():
        for scorer in stage.halting:
            scorer.local[1].bias.data.fill_(0.0)
    return model


@pytest.fixture
def skip(seeded):
    return seeded(detector_skip(**SMALL))


@pytest.mark.parametrize("size", [(32, 32), (27, 45)])
def test_the_laws_of_halting_positions(halting, seeded_input, size):
    x = seeded_input((3, 3, *size))
    with record(halting) as trace:
        halting(x)
    steps = torch.cat([steps_taken(trace, name).flatten() for name in layers(halting)])
    assert len(steps.unique()) > 1, "or nothing is tried here"
    check_equal(halting, x, draws=2)
    check_neighbours(halting, x)


@pytest.mark.parametrize("size", [(32, 32), (27, 45)])
def test_the_laws_of_skipped_layers(skip, seeded_input, size):
    check_dynamic(skip, seeded_input((3, 3, *size)), draws=2, portable=size == (32, 32))


@pytest.mark.parametrize("build", [detector_static, detector_halting, detector_skip])
@pytest.mark.parametrize("channels, size", [(1, (32, 48)), (3, (50, 33)), (5, (8, 9)), (3, (1, 1))])
def test_images_of_any_size_and_channels(build, channels, size):
    model = build(**SMALL, in_channels=channels).eval()
    for batch in (0, 1, 2):
        answer = execute(model, sparse=True)(torch.randn(batch, channels, *size))
        assert answer.shape == (batch, 8, -(-size[0] // 8), -(-size[1] // 8))
        found = decode(answer, size, least=0.0)
        assert len(found) == batch


def test_with_every_unit_kept_it_is_the_static_detector(skip, seeded_input):
    static, x = detector_static(**SMALL).eval(), seeded_input((2, 3, 32, 40))
    own = [t for name, t in skip.state_dict().items() if "gate" not in name]
    static.load_state_dict(dict(zip(static.state_dict(), own, strict=True)))
    with torch.no_grad(), forced(skip, everything):
        torch.testing.assert_close(skip(x), static(x))


def test_what_halts_is_not_computed(halting, seeded_input):
    x = seeded_input((1, 3, 64, 64))
    for stage in layers(halting).values():
        for scorer in stage.halting:
            scorer.local[1].bias.data.fill_(8.0)
    execute(halting, sparse=True)
    cost = CostModel(halting, x)
    with torch.no_grad(), record(halting) as trace, CountMacs() as ran:
        halting(x)
    assert ran.total == pytest.approx(float(cost.spent(trace)[0]), abs=0.5)
    assert ran.total < 0.95 * cost.worst


def test_positions_take_every_unit_at_first():
    """At a bias of -3 a position that was never trained to halt does not."""
    model = detector_halting(**SMALL).eval()
    with torch.no_grad(), record(model) as trace:
        model(torch.randn(1, 3, 64, 64))
    for name, layer in layers(model).items():
        assert isinstance(layer, PositionHalting)
        assert (steps_taken(trace, name) == layer.steps).all()


def test_it_learns(seeded_input):
    """One image with one box: the loss falls, and the box is found."""
    torch.manual_seed(0)
    model = detector_halting(num_classes=2, widths=(8, 16, 16), depths=(1, 1), head=16)
    x = torch.zeros(2, 3, 48, 48)
    x[0, :, 8:40, 16:40], x[1, :, 4:24, 4:28] = 1.0, -1.0
    y = torch.tensor([[[1.0, 16, 8, 40, 40]], [[0.0, 4, 4, 28, 24]]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    objective = DetectionLoss() + 0.01 * PositionPonderCost()
    for _ in range(60):
        with record(model.train()) as trace:
            loss = objective(model(x), y, trace)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gradients = [p.grad.abs().sum() > 0 for s in layers(model).values() for p in s.halting.parameters()]
    assert all(gradients)
    with torch.no_grad():
        found = decode(model.train()(x), (48, 48))
    for k in range(2):
        assert found[k].labels[0] == y[k, 0, 0]
        assert (found[k].boxes[0] - y[k, 0, 1:]).abs().max() < 4


def test_what_is_no_detector():
    with pytest.raises(ConfigError, match="three widths"):
        detector_static(num_classes=3, widths=(4, 8))
    with pytest.raises(ConfigError, match="num_classes must be at least 1, got 0"):
        detector_skip(num_classes=0)
    with pytest.raises(ConfigError, match="depths must be"):
        detector_halting(num_classes=3, depths=(0, 2))


def test_built_without_memory():
    with torch.device("meta"):
        model = detector_halting(num_classes=3)
    assert sum(p.numel() for p in model.parameters()) > 200_000
    assert isinstance(model, nn.Sequential)
