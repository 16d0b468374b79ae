import pytest
import torch

from dynanet.core.errors import DataError
from dynanet.datamodules import TimeSeriesDataModule

SERIES = "@timeStamps false\n@univariate true\n@classLabel true a b\n@data\n"


def series(path, rows, classes="a b"):
    lines = "".join(f"{','.join(map(str, values))}:{label}\n" for values, label in rows)
    path.write_text(SERIES.replace("a b", classes) + lines)


def test_series_are_held_out_by_class(tmp_path):
    rows = [([n, n + 1], "ab"[n % 2]) for n in range(20)]
    series(tmp_path / "Two_TRAIN.ts", rows)
    series(tmp_path / "Two_TEST.ts", rows[:3])
    place = str(tmp_path / "Two")
    found = TimeSeriesDataModule(place, 4, batch=4)
    assert torch.cat([y for _, y in found.held_out]).bincount().tolist() == [2, 2]
    mean, std = found.inputs.mean[0], found.inputs.std[0]
    firsts = [torch.cat([x.x[:, 0, 0] for x, _ in part]) for part in (found.train, found.held_out)]
    values = [set((first * std + mean).round().int().tolist()) for first in firsts]
    assert len(values[0]) == 16 and not values[0] & values[1] and values[0] | values[1] == set(range(20))
    assert TimeSeriesDataModule(place).held_out.samples == 2
    with pytest.raises(DataError, match="cannot hold out 20 of 20"):
        TimeSeriesDataModule(place, 20).setup()
    series(tmp_path / "Two_TEST.ts", rows[:3], "b a")
    with pytest.raises(DataError, match="the classes"):
        TimeSeriesDataModule(place, 4).setup()


def test_the_seed_draws_what_is_held_out_and_the_title_says_so(tmp_path):
    series(tmp_path / "Two_TRAIN.ts", [([n, n], "ab"[n % 2]) for n in range(40)])
    series(tmp_path / "Two_TEST.ts", [([0, 1], "a")])
    one, same, other = (TimeSeriesDataModule(str(tmp_path / "Two"), 10, seed) for seed in (3, 3, 4))
    assert one.title == "Two, 10 training series held out, seed 3" and list(one.classes) == ["a", "b"]
    first, again, different = (next(iter(module.held_out))[0].x for module in (one, same, other))
    assert torch.equal(first, again) and not torch.equal(first, different)
