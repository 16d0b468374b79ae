"""The report of a run is one file, and other networks stand beside it."""

import pytest

from dynanet.core.cost import CostModel
from dynanet.core.errors import ConfigError
from dynanet.experiment import Data, Experiment, Model, Recipe, Run, static_point, write_report
from dynanet.experiment.report import TEST

DIGITS = Experiment(Data("digits"), Model("static_resnet", {"widths": [8], "depths": [1]}), Recipe(epochs=1))


def test_the_report_is_one_file(run, tmp_path):
    path = write_report(run, tmp_path / "there.html")
    text = path.read_text()
    assert "scikit-learn digits" in text and "http://" not in text.replace("http://www.w3.org", "")
    assert {each.name for each in tmp_path.iterdir()} == {"there.html", "digits"}


def test_a_report_shows_static_networks_beside(run, tmp_path):
    static = Run(tmp_path / "beside", DIGITS)
    static.train(progress=False)
    other = static_point(static)
    model, test = static.model, static.data.test
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
    assert other.name == "beside" and other.accuracy == right / test.samples and other.ms > 0
    assert other.macs == CostModel(model, static.data.example()).full
    assert "beside" in write_report(run, tmp_path / "report.html", static=[other]).read_text()
    with pytest.raises(ConfigError, match="is the run of a EarlyExit; expected one of a network with one answer"):
        static_point(run)


def test_the_report_of_a_run_lies_in_its_folder_and_names_its_budgets(run):
    path = write_report(run)
    assert path == run.folder / "report.html"
    text = path.read_text()
    assert "75 % of the MACs" in text and "risk at most 10 %" in text and TEST in text
