"""Random exits: the baseline of a calibrated model."""

import numpy as np
import pytest
import torch
from torch import nn

from dynanet import execute, record
from dynanet.core.errors import StructureError
from dynanet.experiment.evaluation import with_random_exits
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.early_stop import EarlyStop
from dynanet.mechanisms.pixel_cascade import PixelCascade, left_at


def test_random_exits_of_positions_keep_the_rates():
    torch.manual_seed(0)
    exits = [nn.Conv2d(4, 3, 1) for _ in range(3)]
    stages = [[nn.Conv2d(4, 4, 3, padding=1)] for _ in range(2)]
    model = PixelCascade(nn.Conv2d(3, 4, 3, padding=1), stages, exits).eval()
    share = np.array([0.5, 0.3, 0.2])
    drawn = with_random_exits(model, share)
    with torch.no_grad(), record(execute(drawn, sparse=True)) as trace:
        drawn(torch.randn(4, 3, 50, 50))
    found = torch.bincount(left_at(trace).flatten(), minlength=3) / 10_000
    assert found.numpy() == pytest.approx(share, abs=0.03)
    assert (with_random_exits(model, np.array([0.0, 0.0, 1.0])).thresholds == torch.inf).all()
    assert with_random_exits(model, np.array([1.0, 0.0, 0.0])).thresholds[0] == 0
    assert (model.thresholds == torch.inf).all(), "the model itself is left alone"


def test_random_exits_of_samples_keep_the_rates():
    model = EarlyExit([nn.Linear(3, 3) for _ in range(3)], [nn.Linear(3, 2) for _ in range(3)]).eval()
    share = np.array([0.2, 0.5, 0.3])
    drawn = with_random_exits(model, share)
    with torch.no_grad(), record(drawn) as trace:
        drawn(torch.randn(20_000, 3))
    left = torch.stack(trace[""]).sum(0)[:, 0].long()
    assert (torch.bincount(left, minlength=3) / 20_000).numpy() == pytest.approx(share, abs=0.02)


def test_a_learned_policy_has_no_confidence_to_replace():
    model = EarlyStop(nn.GRUCell(2, 4), nn.Linear(4, 2), 2, 4, 3, policy=nn.Linear(4, 1))
    with pytest.raises(StructureError, match="EarlyStop has no confidence"):
        with_random_exits(model, np.array([0.5, 0.3, 0.2]))
