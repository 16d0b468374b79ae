"""The small recurrent network: what it is made of, and what it refuses."""

import pytest
import torch

from dynanet import CostModel, zoo
from dynanet.core.errors import ConfigError, InputError
from dynanet.data.ragged import pad
from dynanet.testing import check_equal


def test_its_macs_are_those_of_a_gru_and_a_head():
    model = zoo.recurrent_stop(num_classes=4, in_channels=3, longest=12, hidden=8, every=4).eval()
    assert model.steps == 3
    assert CostModel(model, torch.randn(1, 12, 3)).full == 12 * 3 * 8 * (3 + 8) + 3 * 8 * 4


def test_laws():
    model = zoo.recurrent_stop(num_classes=4, in_channels=3, longest=6, hidden=5, every=2)
    model.thresholds.fill_(-1.0)
    check_equal(model, torch.randn(4, 6, 3), draws=2)


def test_lengths_and_what_is_refused():
    model = zoo.recurrent_stop(num_classes=4, in_channels=3, longest=6).eval()
    assert model(pad([torch.randn(n, 3) for n in (6, 1, 3)])).shape == (3, 4)
    with pytest.raises(InputError, match="sequences of 7 frames for a layer made for 6 at most"):
        model(torch.randn(1, 7, 3))
    with pytest.raises(ConfigError, match="every must be at least 1, got 0"):
        zoo.recurrent_stop(num_classes=4, in_channels=3, longest=6, every=0)
