"""A run reads its bundle as rarely as it can."""

import pytest

from dynanet.experiment import Data, Experiment, Model, Recipe, RequestedBudgets, Run, write_report
from dynanet.export import bundles

TINY = Model("staged_resnet", {"widths": [4, 8], "depths": [1, 1], "context": 4})


@pytest.fixture
def reads(monkeypatch):
    """The folders of the bundles that are loaded, in order."""
    folders = []
    whole = bundles.read

    def read(folder, *args, **kwargs):
        folders.append(folder)
        return whole(folder, *args, **kwargs)

    monkeypatch.setattr(bundles, "read", read)
    return folders


@pytest.fixture
def passes(monkeypatch):
    """The data that tables are made of, in order."""
    from dynanet.calibrate import frontier
    from dynanet.experiment import run

    loaders = []
    whole = frontier.tabulate

    def tabulate(model, loader, *args, **kwargs):
        loaders.append(loader)
        return whole(model, loader, *args, **kwargs)

    monkeypatch.setattr(frontier, "tabulate", tabulate)
    monkeypatch.setattr(run, "tabulate", tabulate)
    return loaders


def test_calibration_loads_the_model_once(digits_run, tmp_path, reads):
    import shutil

    run = Run(shutil.copytree(digits_run, tmp_path / "digits"))
    points = run.calibrate(RequestedBudgets(shares=(0.75,), risk=None))
    assert run.operating_points is points and run.full_macs and run.unreachable is not None
    assert reads == [run.folder / "model"]


def test_all_steps_of_the_demo_load_the_model_once_and_pass_over_each_split_once(tmp_path, reads, passes):
    run = Run(tmp_path / "run", Experiment(Data("digits"), TINY, Recipe(epochs=1, batch=64, lr=0.1)))
    run.train(progress=False)
    run.calibrate(RequestedBudgets(shares=(0.9,), risk=None))
    run.evaluate()
    run.bench(share=0.9, batches=(1,), rounds=1, echo=lambda line: None)
    write_report(run)
    assert len(reads) <= 2
    assert passes == [run.data.held_out, run.data.test]


def test_what_was_kept_is_dropped_when_a_newer_one_is_written(tmp_path):
    run = Run(tmp_path / "run", Experiment(Data("digits"), TINY, Recipe(epochs=1, batch=64, lr=0.1)))
    run.train(progress=False)
    run.calibrate(RequestedBudgets(shares=(0.9,), risk=None))
    model, frontier, table = run.model, run.frontier, run.test_table
    assert run.model is model and run.frontier is frontier and run.test_table is table
    run.calibrate(RequestedBudgets(shares=(0.8,), risk=None))
    assert run.model is model and run.frontier is not frontier
    assert [point.budget.macs for point in run.operating_points] == [0.8 * run.full_macs]
    run.train(resume=True, progress=False)
    assert run.model is not model and run.test_table is not table
