"""What numpy and data sets give is trained on as if it were in torch's own form, or refused by a DataError."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dynanet import train
from dynanet.core.errors import DataError
from dynanet.mechanisms.early_exit import EarlyExit

X = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


def network(norm=False):
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)) if norm else nn.Linear(8, 4)
    return EarlyExit([first, nn.Linear(4, 4)], [nn.Linear(4, 3), nn.Linear(4, 3)])


def fitted(folder, x, y, *, held_out=None, model=None, objective=None, batch_size=4, drop_last=False):
    given = DataLoader(TensorDataset(x, y), batch_size, drop_last=drop_last)
    done = train.fit(
        model if model is not None else network(),
        given,
        DataLoader(TensorDataset(*held_out), 4) if held_out else None,
        objective=objective if objective is not None else train.MultiExit(),
        epochs=1,
        folder=folder,
        progress=False,
        trainer_options={"logger": False},
    )
    return done.model.state_dict(), done


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("column", [False, True], ids=["(N,)", "(N, 1)"])
@pytest.mark.parametrize("objective", [train.MultiExit(distill=0.5), train.CrossEntropy(0.1)], ids=["exits", "answer"])
def test_whole_numbers_of_any_width_are_classes(tmp_path, dtype, column, objective):
    y = (Y[:, None] if column else Y).to(dtype)
    expected, usual = fitted(tmp_path / "a", X, Y, held_out=(X, Y), objective=objective)
    weights, done = fitted(tmp_path / "b", X, y, held_out=(X, y), objective=objective)
    assert same(weights, expected) and done.metrics == usual.metrics and "val/accuracy" in done.metrics


def test_float64_is_brought_to_the_precision_of_the_model(tmp_path):
    x = torch.from_numpy(X.numpy().astype(np.float64))
    expected, _ = fitted(tmp_path / "a", X, Y)
    assert same(fitted(tmp_path / "b", x, Y, held_out=(x, Y))[0], expected)
    weights, _ = fitted(tmp_path / "c", x, Y, model=network().double())
    assert all(weight.dtype == torch.float64 for weight in weights.values() if weight.is_floating_point())
    chances = nn.functional.one_hot(Y, 3).double()
    assert same(fitted(tmp_path / "d", x, chances)[0], fitted(tmp_path / "e", X, chances.float())[0])


@pytest.mark.parametrize(
    "x, y, told",
    [
        (X, Y + 1, "labels from 1 to 3.*as many classes"),
        (X, Y - 1, "labels from -1 to 1.*number them from 0"),
        (X, Y.float(), r"labels, \(4,\) of float32 beside answers \(4, 3\)"),
        (X, torch.stack([Y, Y], 1), r"labels, \(4, 2\) of int64"),
        (X[:, :7], Y, r"inputs \(4, 7\) of float32.*that the model was built for"),
        (X.to(torch.uint8), Y, r"inputs \(4, 8\) of uint8"),
        (X.to(torch.complex64), Y, "inputs .* of complex64"),
    ],
    ids=["above", "below", "floats", "two columns", "features", "bytes", "complex"],
)
@pytest.mark.parametrize("where", ["training", "validation"])
def test_what_cannot_be_trained_on_is_named(tmp_path, x, y, told, where):
    with pytest.raises(DataError, match=told):
        if where == "training":
            fitted(tmp_path, x, y)
        else:
            fitted(tmp_path, X, Y, held_out=(x, y))


def test_a_last_batch_of_one_row_before_a_batch_norm(tmp_path):
    with pytest.raises(DataError, match=r"inputs \(1, 8\).*drop_last=True, or a batch size"):
        fitted(tmp_path / "a", X, Y, model=network(norm=True))
    fitted(tmp_path / "b", X, Y, model=network(norm=True), drop_last=True)
    fitted(tmp_path / "c", X, Y, model=network(norm=True), batch_size=3)
    fitted(tmp_path / "d", X[:8], Y[:8], model=network(norm=True), held_out=(X, Y))  # in eval mode one row does


class Lone(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return X[i]


@pytest.mark.parametrize("dataset", [Lone(), TensorDataset(X), TensorDataset(X, Y, Y)], ids=["x", "(x,)", "(x, y, z)"])
def test_batches_that_are_no_pairs(tmp_path, dataset):
    with pytest.raises(DataError, match=r"expected \(inputs, labels\)"):
        train.fit(network(), DataLoader(dataset, 2), objective=train.MultiExit(), epochs=1, folder=tmp_path)


def test_what_data_cannot_mend_stays_as_it_is(tmp_path):
    class Broken(nn.Module):
        def __init__(self, error):
            super().__init__()
            self.layer, self.error = nn.Linear(8, 3), error

        def forward(self, x):
            raise self.error

    for n, error in enumerate((torch.OutOfMemoryError("full"), RuntimeError("can't allocate memory"), KeyError("k"))):
        with pytest.raises(type(error)):
            fitted(tmp_path / str(n), X, Y, model=Broken(error), objective=train.CrossEntropy())
