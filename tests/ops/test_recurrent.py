import pytest
import torch
from torch import nn

from dynanet.ops.recurrent import hidden_of, next_step, zero_state

CELLS = [(nn.GRUCell(3, 5), False), (nn.RNNCell(3, 5), False), (nn.LSTMCell(3, 5), True)]


@pytest.mark.parametrize("cell, pair", CELLS)
def test_the_zero_state_is_the_one_that_torch_starts_from(cell, pair):
    cell, x = cell.double(), torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(cell(x, zero_state(x, 4, 5, pair=pair)), cell(x))


@pytest.mark.parametrize("cell", [nn.GRUCell(3, 5), nn.LSTMCell(3, 5)])
def test_hidden_is_the_output_of_the_cell(cell):
    state = cell(torch.randn(4, 3))
    hidden = hidden_of(state)
    assert hidden.shape == (4, 5)
    assert hidden is (state[0] if isinstance(cell, nn.LSTMCell) else state)


def test_the_next_step_is_the_first_that_is_set():
    mask = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]]).bool()
    assert next_step(mask).tolist() == [[1, 1, 4, 4, 4], [5, 5, 5, 5, 5], [0, 2, 2, 5, 5]]
    assert next_step(mask[:0]).shape == (0, 5)
