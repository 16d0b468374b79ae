"""Operators that torch's counter does not know: counted, refused by name, or named in the cost table; never 0."""

import pytest
import torch
from torch import nn

from dynanet.core.cost import CostModel
from dynanet.core.errors import StructureError

pytestmark = pytest.mark.filterwarnings("ignore:.*(quantiz|Quantiz|reduce_range|TypedStorage).*")


class Runs(nn.Module):
    def __init__(self, function, *inside):
        super().__init__()
        self.function = function
        self.inside = nn.ModuleList(inside)

    def forward(self, x):
        return self.function(x, *self.inside)


def quantized(model, dtype=torch.qint8):
    return torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear, nn.LSTMCell, nn.GRUCell, nn.LSTM}, dtype)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("shape", [(1, 16), (3, 16), (2, 5, 16)])
def test_quantized_linears_cost_what_they_cost_before(dtype, shape):
    plain = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(shape)
    assert CostModel(quantized(plain, dtype), x).full == CostModel(plain, x).full > 0


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_quantized_cells(kind):
    cell, x = kind(4, 6), torch.randn(3, 4)
    found = CostModel(Runs(lambda x, cell: cell(x)[0], quantized(nn.Sequential(cell))[0]), x).full
    assert found == CostModel(Runs(lambda x, cell: cell(x)[0], cell), x).full > 0


def test_what_cannot_be_counted_is_refused():
    model = Runs(lambda x, net: net(x)[0], quantized(nn.Sequential(nn.LSTM(4, 6)))[0])
    with pytest.raises(StructureError, match="aten::quantized_lstm multiplies"):
        CostModel(model, torch.randn(3, 2, 4))
    model = Runs(lambda x: torch.sparse.mm(torch.eye(4).to_sparse(), x.T).T)
    with pytest.raises(StructureError, match="aten::_sparse_addmm multiplies"):
        CostModel(model, torch.randn(3, 4))


def test_what_may_multiply_is_named_in_the_table():
    cost = CostModel(Runs(lambda x: torch.fft.rfft(x).abs()), torch.randn(3, 4))
    assert cost.full == 0 and cost.uncounted == ["aten::_fft_r2c"]
    assert str(cost).endswith("not counted: aten::_fft_r2c")


@torch.library.custom_op("tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_operators_of_other_packages_are_named():
    assert CostModel(Runs(doubled), torch.randn(3, 4)).uncounted == ["tests::doubled"]
    assert CostModel(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.LayerNorm(4)), torch.randn(3, 4)).uncounted == []
