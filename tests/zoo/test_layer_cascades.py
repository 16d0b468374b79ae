import pytest
import torch

from dynanet import CostModel, execute, record
from dynanet.core.errors import ConfigError
from dynanet.export.bundles import bundle
from dynanet.mechanisms.pixel_cascade import left_at
from dynanet.session import Session
from dynanet.zoo import layer_cascade, layer_cascade_static
from dynanet.zoo.saved import load

TINY = {"num_classes": 5, "widths": (4, 6, 8, 8), "cells": (1, 2)}


def tiny(**more):
    torch.manual_seed(0)
    model = layer_cascade(**TINY | more).eval()
    for exit_ in model.exits:
        torch.nn.init.normal_(exit_.weight)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def copied(cascade):
    """The cascade's own weights in the static network."""
    static = layer_cascade_static(**TINY).eval()
    encoder, *residuals, head = static.net
    encoder.load_state_dict(cascade.backbone.state_dict())
    cells = [cell for stage in cascade.stages for cell in stage]
    for residual, cell in zip(residuals, cells, strict=True):
        residual.cell.load_state_dict(cell.state_dict())
    head.load_state_dict(cascade.exits[-1].state_dict())
    return static


def test_what_it_costs():
    x = torch.zeros(1, 3, 180, 240)
    cost = CostModel(layer_cascade(num_classes=11), x)
    static = CostModel(layer_cascade_static(num_classes=11), x)
    at_a_quarter = 45 * 60
    stage = 2 * 2 * 9 * 64 * 64 + 64 * 11
    assert cost.unit[""].tolist() == [stage, stage]
    assert cost.full == cost.worst == cost.always + 2 * at_a_quarter * stage
    assert static.full == cost.full - 2 * at_a_quarter * 64 * 11  # two exits fewer
    assert round(cost.full / 1e9, 2) == 1.06 and round(cost.always / 1e9, 2) == 0.26  # as the docstring says


@pytest.mark.parametrize("size", [(45, 61), (17, 3), (1, 1)])
def test_sizes_no_stride_divides_and_the_static_network(size):
    model, x = tiny(), torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), copied(model)(x))
        model.thresholds.fill_(0.5)
        torch.testing.assert_close(execute(model, sparse=True)(x), execute(model, sparse=False)(x))


@pytest.mark.parametrize("channels", [1, 200])
def test_other_channels(channels):
    model = tiny(in_channels=channels)
    assert model(torch.randn(1, channels, 9, 14)).shape == (1, 5, 9, 14)


def test_a_session_answers_what_the_model_does():
    model, x = tiny(), torch.randn(3, 3, 29, 38)
    model.thresholds.fill_(0.5)
    session = Session(model, x[:1], batches=(1,), engines="eager")
    with torch.no_grad(), record(model) as dense:
        expected = model(x)
    with record(session) as sparse:
        torch.testing.assert_close(session(x), expected, rtol=1e-3, atol=1e-3)
    assert left_at(sparse).unique().tolist() == [0, 1, 2]
    assert (left_at(sparse) == left_at(dense)).float().mean() > 0.99


def test_it_can_be_saved(tmp_path):
    model, x = tiny(), torch.randn(1, 3, 20, 24)
    model.thresholds[0] = 1.5
    bundle(model, tmp_path / "model", classes=list("abcde"))
    again = load(tmp_path / "model")
    torch.testing.assert_close(again(x), model(x))
    assert torch.equal(again.thresholds, model.thresholds)


def test_what_is_refused():
    for wrong, said in (
        ({"widths": (4, 6, 8)}, "widths must be four"),
        ({"widths": (8, 6, 8, 8)}, "none smaller"),
        ({"cells": (1,)}, "one of each per stage"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"cells": (0, 1)}, r"cells must be at least 1, got \(0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=said):
            layer_cascade(**TINY | wrong)
    with pytest.raises(ConfigError, match="in_channels must be at least 1, got -1"):
        layer_cascade_static(**TINY | {"in_channels": -1})
