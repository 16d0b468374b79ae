import pytest
import torch

from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, forced, layers
from dynanet.core.errors import ConfigError
from dynanet.core.macs import CountMacs
from dynanet.testing import check_equal
from dynanet.zoo.cgnets import cgnet

SMALL = {"num_classes": 4, "widths": (4, 8), "depths": (1, 1)}


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"tile": 3}, {"groups": 2, "tile": 3}])
def test_it_keeps_the_laws(options):
    torch.manual_seed(0)
    check_equal(cgnet(**SMALL, **options), torch.randn(3, 3, 8, 7), draws=2)


def test_full_it_is_resnet18_and_closed_a_quarter_of_its_blocks():
    """By hand: 3x3 convolutions of the blocks, and what always runs beside them."""
    pixels = [(64, 64, 32)] * 4 + [(64, 128, 16)] + [(128, 128, 16)] * 3
    pixels += [(128, 256, 8)] + [(256, 256, 8)] * 3 + [(256, 512, 4)] + [(512, 512, 4)] * 3
    gated = sum(9 * c * o * s * s for c, o, s in pixels)
    beside = 27 * 64 * 32**2 + sum(c * o * s * s for c, o, s in ((64, 128, 16), (128, 256, 8), (256, 512, 4))) + 5120
    model = cgnet(num_classes=10).eval()
    cost = CostModel(model, torch.zeros(1, 3, 32, 32))
    assert cost.full == gated + beside
    with torch.no_grad(), forced(execute(model, sparse=True), lambda d: torch.zeros_like(d.keep)), CountMacs() as count:
        model(torch.zeros(1, 3, 32, 32))
    assert count.total == gated / 4 + beside


def test_tiles_decide_where_there_is_no_stride():
    found = [layer.tile is not None for layer in layers(cgnet(**SMALL, tile=4)).values()]
    assert found == [True, True, False, True]


@pytest.mark.parametrize("arguments, says", [
    ({"share": 0.0}, "share must be .* got 0.0"),
    ({"share": 1.0}, "share must be .* got 1.0"),
    ({"groups": 3}, "divide every width"),
    ({"tile": 0}, "tile must be at least 1, got 0"),
    ({"depths": (1,)}, "one depth per width"),
])  # fmt: skip
def test_what_means_no_network_is_refused(arguments, says):
    with pytest.raises(ConfigError, match=says):
        cgnet(**{**SMALL, **arguments})
