"""Calibration where positions of an image leave one by one."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dynanet import Budget, CostModel, execute, record
from dynanet.calibrate import ExitTable, Frontier, calibrate, tabulate
from dynanet.calibrate.table import POSITIONS
from dynanet.core.errors import BudgetError, DataError, StructureError
from dynanet.mechanisms.pixel_cascade import PixelCascade

VOID = 9


def cascade():
    torch.manual_seed(0)
    cells = [[nn.Conv2d(4, 4, 3, padding=1)], [nn.Conv2d(4, 4, 3, padding=1)]]
    return PixelCascade(nn.Conv2d(3, 4, 3, stride=2, padding=1), cells, [nn.Conv2d(4, 3, 1) for _ in range(3)]).eval()


def data(model, count=6, size=(13, 18)):
    """What the whole model answers is the truth, but for a void line."""
    x = torch.randn(count, 3, *size)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:, :3] = VOID
    return [(x[:4], y[:4]), (x[4:], y[4:])]


def table_of(model, batches):
    return tabulate(model, batches, CostModel(model, batches[0][0][:1]), ignore=VOID)


def test_rows_are_labelled_positions():
    model = cascade()
    batches = data(model)
    table = table_of(model, batches)
    x, y = (torch.cat(each) for each in zip(*batches, strict=True))
    with torch.no_grad(), record(model) as trace:
        model(x)
    truth = functional.interpolate(y[:, None].double(), size=(7, 9), mode="nearest-exact")[:, 0].long().flatten()
    known = truth != VOID
    assert table.samples == int(known.sum()) and table.labels.tolist() == truth[known].tolist()
    for k, logits in enumerate(trace.answers[""]):
        assert table.answers[:, k].tolist() == logits.argmax(1).flatten()[known].tolist()
    assert table.groups.tolist() == torch.arange(6).repeat_interleave(63)[known].tolist()
    cost = CostModel(model, x[:1])
    assert table.macs[0] == cost.always and table.macs[-1] == cost.full  # of an image, all of which leaves there


def test_budgets_are_met_on_whole_images():
    model = cascade()
    batches = data(model, count=40)
    cost = CostModel(model, batches[0][0][:1])
    frontier = calibrate(model, batches, cost, ignore=VOID)
    x = torch.cat([x for x, _ in batches])
    for share in (0.6, 0.8):
        at = execute(frontier.at(Budget(macs=share * cost.full)), sparse=True)
        with torch.no_grad(), record(at) as trace:
            at(x)
        assert float(cost.spent(trace).mean()) / cost.full == pytest.approx(share, abs=0.06)
    assert (model.thresholds == torch.inf).all()


def test_large_images_give_evenly_spaced_positions():
    model = cascade()
    table = table_of(model, data(model, count=5, size=(80, 70)))
    assert (np.bincount(table.groups) <= POSITIONS).all() and table.samples > 4 * POSITIONS


def test_it_is_saved_with_its_groups(tmp_path):
    model = cascade()
    frontier = Frontier(model, table_of(model, data(model)))
    frontier.save(tmp_path / "frontier")
    again = Frontier.load(tmp_path / "frontier", model)
    assert again.table.groups.tolist() == frontier.table.groups.tolist()
    half = frontier.table.take(frontier.table.groups < 3)
    assert half.groups.max() == 2 and half.first(2).groups is not None


def test_what_is_refused():
    model = cascade()
    (x, y), *_ = data(model)
    cost = CostModel(model, x[:1])
    for labels, said in (
        (y[:, 1:], "one label per pixel"),
        (torch.full_like(y, VOID), "all labels of the held-out data are 9"),
        (torch.full_like(y, 3), "got 3 to 3"),
        (y[:, 0, 0], "logits of shape .samples, classes."),
    ):
        with pytest.raises(DataError, match=said):
            calibrate(model, [(x, labels)], cost, ignore=VOID)
    with pytest.raises(DataError, match="got . to 9"):
        calibrate(model, [(x, y)], cost)
    frontier = calibrate(model, [(x, y)], cost, ignore=VOID)
    with pytest.raises(BudgetError, match="depend on each other"):
        frontier.at(Budget(risk=0.1, confidence=0.9))
    with pytest.raises(BudgetError, match="below the cheapest"):
        frontier.at(Budget(macs=0.5 * cost.always))
    with pytest.raises(StructureError, match="no layer that halts"):
        calibrate(model.backbone, [(x, y)], cost)
    with pytest.raises(DataError, match="groups of a table"):
        ExitTable(np.zeros((2, 1)), np.zeros((2, 2)), np.ones((2, 2)), np.ones(2), groups=np.zeros(3))


def test_labels_that_are_void_in_one_batch():
    model = cascade()
    (x, y), rest = data(model)
    table = table_of(model, [(x, torch.full_like(y, VOID)), rest])
    assert set(table.groups.tolist()) == {4, 5}
