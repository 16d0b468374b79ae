from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

from dynanet.calibrate.table import ExitTable, halt_of, tabulate
from dynanet.core.cost import CostModel
from dynanet.core.dynamic import execute, record
from dynanet.core.errors import DataError, StructureError
from dynanet.mechanisms.early_exit import EarlyExit
from dynanet.mechanisms.layer_skip import LayerSkip

EXAMPLE = torch.zeros(1, 6)


def leave_at(model, k):
    """Thresholds that send everybody to exit k."""
    halt = halt_of(model)[1]
    halt.thresholds.fill_(torch.inf)
    if k < halt.steps - 1:
        halt.thresholds[k] = -torch.inf
    return model


@pytest.mark.parametrize("name", ["plain", "nested"])
def test_a_table_says_what_really_happens_at_every_exit(name, request, held_out):
    model = request.getfixturevalue(name).eval()
    cost = CostModel(model, EXAMPLE)
    table = tabulate(model, held_out, cost, keep_logits=True)
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    assert table.samples == 150 and (table.macs.ndim == 2) == (name == "nested")
    execute(model, sparse=True)
    for k in range(table.exits):
        with torch.no_grad(), record(leave_at(model, k)) as trace:
            logits = model(x)
        np.testing.assert_array_equal(table.answers[:, k], logits.argmax(-1).numpy())
        np.testing.assert_array_equal(table.correct[:, k], (logits.argmax(-1) == y).numpy())
        np.testing.assert_allclose(table.logits[:, k], logits.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.broadcast_to(table.macs, (150, table.exits))[:, k], cost.spent(trace).numpy())
        if k + 1 < table.exits:
            sure = halt_of(model)[1].confidence(logits)[:, 0]
            np.testing.assert_allclose(table.scores[:, k], sure.numpy(), rtol=1e-4, atol=1e-5)


def test_the_most_expensive_path_is_held_against_a_cap(nested, held_out):
    cost = CostModel(nested, EXAMPLE)
    table = tabulate(nested, held_out, cost)
    assert table.worst[-1] == cost.worst
    assert (table.macs <= table.worst).all() and (np.diff(table.worst) > 0).all()


def test_what_the_model_is_set_to_does_not_matter_and_is_left_alone(plain, held_out):
    cost = CostModel(plain, EXAMPLE)
    expected = tabulate(plain.eval(), held_out, cost)
    plain.train()
    plain.exits[1].eval()
    plain.limit, modes = 2, [m.training for m in plain.modules()]
    plain.thresholds.fill_(-torch.inf)
    for sparse in (False, True):
        found = tabulate(execute(plain, sparse=sparse), held_out, cost)
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_array_equal(found.answers, expected.answers)
    assert plain.limit == 2 and plain.force is None and modes == [m.training for m in plain.modules()]
    assert (plain.thresholds == -torch.inf).all()


def test_a_model_whose_exits_cannot_be_chosen_is_refused(plain, held_out):
    cost = CostModel(plain, EXAMPLE)
    with pytest.raises(StructureError, match="no layer that halts"):
        tabulate(nn.Linear(6, 3), held_out, cost)
    with pytest.raises(StructureError, match="single step"):
        tabulate(EarlyExit([nn.Linear(6, 6)], [nn.Linear(6, 3)]), held_out, cost)
    with pytest.raises(StructureError, match="side by side"):
        halt_of(nn.ModuleList([plain, plain.__class__([nn.Identity()], [nn.Identity()])]))


def test_a_halt_that_another_layer_guards_is_refused(nested, held_out):
    gate = nested[1].stages[0][1].gate
    guarded = LayerSkip(EarlyExit([nn.Linear(6, 6)] * 2, [nn.Linear(6, 6)] * 2), gate)
    with pytest.raises(StructureError, match="runs only where"):
        tabulate(guarded, held_out, CostModel(guarded, EXAMPLE))


def test_the_outermost_halt_is_the_one(plain):
    outer = EarlyExit([nn.Linear(6, 6), nn.Sequential(plain, nn.Linear(3, 6))], [nn.Linear(6, 3)] * 2)
    assert halt_of(nn.Sequential(outer)) == ("0", outer)


@pytest.mark.parametrize(
    "spoilt",
    [
        [],
        [(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))],
        [(torch.zeros(4, 6), torch.tensor([0, 1, 2, 3]))],
        [(torch.zeros(4, 6), torch.tensor([0, 1, 2, -1]))],
        [(torch.zeros(4, 6), torch.zeros(4, 2, dtype=torch.long))],
        [(torch.zeros(4, 6), torch.zeros(4))],
        [(torch.full((4, 6), torch.nan), torch.zeros(4, dtype=torch.long))],
    ],
)
def test_held_out_data_that_cannot_be_used_is_refused(plain, spoilt):
    with pytest.raises(DataError):
        tabulate(plain, spoilt, CostModel(plain, EXAMPLE))
    assert plain.force is None and plain.limit is None


def test_a_table_comes_back_from_its_file(tmp_path, nested, held_out):
    table = tabulate(nested, held_out, CostModel(nested, EXAMPLE), keep_logits=True)
    table.save(tmp_path / "table.npz")
    back = ExitTable.load(tmp_path / "table.npz")
    for name in ("scores", "answers", "correct", "macs", "worst", "labels", "logits"):
        np.testing.assert_array_equal(getattr(back, name), getattr(table, name))
    assert back.ms is None


def test_a_file_that_is_no_table_is_refused(tmp_path, draw):
    path = tmp_path / "table.npz"
    with pytest.raises(DataError, match="cannot be read"):
        ExitTable.load(path)
    draw(0, 50).save(path)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="cannot be read"):
            ExitTable.load(path)
    for at in range(40, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with suppress(DataError):  # a flipped bit may be in padding, and then the table is whole
            ExitTable.load(path)
    np.savez(path, scores=np.array([{}], dtype=object))  # a pickle in disguise
    with pytest.raises(DataError, match="cannot be read"):
        ExitTable.load(path)
    np.savez(path, scores=np.zeros((3, 1)))
    with pytest.raises(DataError, match="has at least"):
        ExitTable.load(path)


def test_parts_of_a_table_agree_with_the_whole(draw):
    table = draw(0, 100)
    first = table.first(3)
    assert first.scores.shape == (100, 2) and first.exits == 3
    np.testing.assert_array_equal(first.correct, table.correct[:, :3])
    np.testing.assert_array_equal(first.macs, table.macs[:3])
    some = table.take(np.arange(100) % 3 == 0)
    np.testing.assert_array_equal(some.scores, table.scores[::3])
    np.testing.assert_array_equal(some.labels, table.labels[::3])


@pytest.mark.parametrize(
    "spoilt",
    [
        {"scores": np.zeros((4, 3))},
        {"scores": np.full((4, 2), np.nan)},
        {"scores": np.full((4, 2), np.inf)},
        {"macs": np.zeros(2)},
        {"macs": np.full(3, np.inf)},
        {"ms": np.zeros((4, 3))},
        {"correct": np.zeros((0, 3), bool)},
        {"labels": np.zeros(5)},
        {"logits": np.zeros((4, 2, 10))},
    ],
)
def test_arrays_that_do_not_fit_are_refused(spoilt):
    good = {"scores": np.zeros((4, 2)), "answers": np.zeros((4, 3)), "correct": np.ones((4, 3)), "macs": np.ones(3)}
    assert ExitTable(**good).exits == 3
    with pytest.raises(DataError):
        ExitTable(**good | spoilt)
