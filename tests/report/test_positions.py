import math

import numpy as np
import pytest
import torch
from torch import nn

from dynanet import zoo
from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, execute, record
from dynanet.core.errors import InputError, StructureError
from dynanet.gates.scorers import ContextScorer
from dynanet.mechanisms.position_halting import PositionHalting, steps_taken
from dynanet.mechanisms.token_drop import TokenPredictor
from dynanet.ops.tiles import Tiles
from dynanet.report.positions import beside_boxes, cover, places, units_per_position


def stage(tile=1, halo=0):
    torch.manual_seed(0)
    cells = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
    scores = [ContextScorer(4, tile, bias=-0.5) for _ in range(3)]
    return PositionHalting(cells, scores, Tiles(tile, halo), first=nn.Identity(), residual=True, dilate=not halo)


@pytest.mark.parametrize("sparse", [False, True])
def test_units_of_every_position(sparse):
    x, model = torch.randn(2, 4, 6, 8), execute(stage().eval(), sparse=sparse)
    with torch.no_grad(), record(model) as trace:
        model(x)
    units = units_per_position(trace, (12, 16))
    assert len(units.unique()) > 1
    assert torch.equal(units[:, ::2, ::2], steps_taken(trace) - 1)  # the first step is no unit
    assert torch.equal(units[:, ::2, ::2], units[:, 1::2, 1::2])


def test_layers_add_up_whatever_their_rows():
    model = nn.Sequential(stage(), nn.AvgPool2d(2), stage(tile=2, halo=1)).eval()
    with torch.no_grad(), record(model) as trace:
        model(torch.randn(1, 4, 8, 8))
    fine, coarse = (sum(trace[name])[..., -1] for name in ("0", "2"))
    expected = fine + coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(units_per_position(trace, (8, 8)), expected)


def test_no_layer_of_positions():
    with record(nn.Identity()) as trace, pytest.raises(StructureError, match="positions"):
        units_per_position(trace, (4, 4))


def test_boxes_cover_the_pixels_whose_middle_they_hold():
    covered = cover(torch.tensor([[1.0, 0, 3, 1.4], [2.6, 1.6, 4, 3]]), (3, 4))
    assert covered.int().tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert not cover(torch.zeros(0, 4), (3, 4)).any()


def test_the_correlation_is_pearsons():
    torch.manual_seed(0)
    boxes = [torch.tensor([[1.0, 1, 5, 6]]), torch.zeros(0, 4), torch.tensor([[0.0, 0, 9, 2]])]
    compute = torch.rand(3, 8, 9)
    inside = torch.stack([cover(b, (8, 9)) for b in boxes])
    said = beside_boxes(compute + inside, boxes)
    values = (compute + inside).flatten().numpy()
    assert said.correlation == pytest.approx(np.corrcoef(values, inside.flatten().numpy())[0, 1])
    assert said.inside == pytest.approx(float(values[inside.flatten()].mean()))
    assert said.outside == pytest.approx(float(values[~inside.flatten()].mean()))


def test_where_there_is_nothing_to_compare():
    flat = torch.ones(1, 4, 4)
    none, everywhere = [torch.zeros(0, 4)], [torch.tensor([[0.0, 0, 4, 4]])]
    some = [torch.tensor([[0.0, 0, 2, 2]])]
    assert beside_boxes(flat, some)[:2] == (1, 1) and math.isnan(beside_boxes(flat, some).correlation)
    assert math.isnan(beside_boxes(torch.rand(1, 4, 4), none).inside)
    assert math.isnan(beside_boxes(torch.rand(1, 4, 4), everywhere).outside)
    assert all(math.isnan(v) for v in beside_boxes(torch.zeros(0, 4, 4), []))
    with pytest.raises(InputError, match="got those of 0"):
        beside_boxes(flat, [])


TOKENS = {"num_classes": 3, "size": 8, "patch": 2, "width": 12, "depth": 3, "heads": 2}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("build", [zoo.dynamic_vit, zoo.evit, zoo.a_vit])
def test_tokens_lie_where_their_patches_lie(build, sparse):
    torch.manual_seed(0)
    more = {"shift": -1.0} if build is zoo.a_vit else {"drops": (1, 2)}
    model, x = execute(build(**TOKENS, **more).eval(), sparse=sparse), 5 * torch.randn(2, 3, 8, 8)
    for layer in model.modules():
        if isinstance(layer, TokenPredictor):
            layer.decide[-1].bias.data.zero_()
    with torch.no_grad(), record(model) as trace:
        model(x)
    assert places(trace, (8, 8)) == trace.keys()
    units = units_per_position(trace, (8, 8))
    assert len(units.unique()) > 1
    kept = sum(sum(trace[name]) for name in trace.keys())[:, 1:, 0]  # the class token has no place
    assert torch.equal(units[:, ::2, ::2].flatten(1), kept)
    assert torch.equal(units[:, ::2, ::2], units[:, 1::2, 1::2])


def test_patches_of_an_image_that_is_no_square():
    for first in (0, 1):
        keep = torch.arange(8.0).expand(1, 8)[..., None]
        keep = torch.cat([torch.full((1, first, 1), 9.0), keep], 1)
        with record(Says()) as trace:
            next(iter(trace.names)).tap(Decision(keep, keep))
        assert torch.equal(units_per_position(trace, (4, 8))[0, ::2, ::2], torch.arange(8.0).reshape(2, 4))
        assert places(trace, (5, 8)) == [], "tokens that are no patches"


class Says(Dynamic):
    pass
