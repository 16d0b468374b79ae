import pytest
import torch
from torch import nn

from dynanet import train
from dynanet.core.dynamic import execute, forced
from dynanet.core.errors import DataError
from dynanet.core.gate import Gate
from dynanet.gates.rules import Threshold
from dynanet.mechanisms.layer_skip import LayerSkip
from tests.train.train_toys import toy


def test_statistics_are_the_average_over_batches_and_nothing_else_changes():
    model = toy().train()
    norm, x = model.stages[0][1], torch.randn(6, 10, 8) * 3 + 1
    others = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("stages.0.1")}
    norm.running_mean.fill_(99.0)
    assert train.recalibrate_batchnorm(model, [(batch, None) for batch in x], batches=4) is model
    with torch.no_grad():
        seen = [model.stages[0][0](batch) for batch in x[:4]]
    torch.testing.assert_close(norm.running_mean, torch.stack([s.mean(0) for s in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([s.var(0) for s in seen]).mean(0))
    assert norm.momentum == 0.1 and all(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in others.items())


def test_in_the_sparse_form_a_norm_sees_the_rows_that_run_it():
    norm = nn.BatchNorm1d(8)
    skip = execute(LayerSkip(norm, Gate(nn.Linear(8, 1), Threshold())).eval(), sparse=True)
    x = torch.randn(10, 8)
    with forced(skip, lambda d: (torch.arange(len(d.keep)) < 4)[:, None]):
        train.recalibrate_batchnorm(skip, [x])
    torch.testing.assert_close(norm.running_mean, x[:4].mean(0))
    before = norm.running_mean.clone()
    with forced(skip, lambda d: torch.zeros_like(d.keep)):
        train.recalibrate_batchnorm(skip, [x])
    assert torch.equal(norm.running_mean, before)  # nothing ran it: nothing to go by


def test_an_empty_loader_changes_nothing():
    model = toy()
    model.stages[0][1].running_mean.fill_(7.0)
    with pytest.raises(DataError, match="no batch came"):
        train.recalibrate_batchnorm(model, [])
    assert (model.stages[0][1].running_mean == 7.0).all()
