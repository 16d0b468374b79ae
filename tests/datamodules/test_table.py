"""A new data module is one class and one line of the table."""

import json

import pytest

from dynanet.cli.commands import main
from dynanet.core.errors import ConfigError
from dynanet.datamodules import DATA_MODULES
from dynanet.experiment import Data


def test_it_is_opened_by_name_on_the_command_line(stripes, tmp_path, capsys):
    small = "{widths: [4, 8], depths: [1, 1], context: 4}"
    given = ["--data.name", "stripes", "--data.size", "8", "--data.held_out", "5", "--model.name", "staged_resnet"]
    given += ["--model.arguments", small, "--recipe.epochs", "3", "--recipe.batch", "8"]
    assert main(["train", str(tmp_path / "run"), *given]) == 0
    assert main(["calibrate", str(tmp_path / "run"), "--shares", "0.9", "--risk", "null"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["data"] == "stripes, 5 held out" and results["test_samples"] == 8
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "sentences,stripes}" in capsys.readouterr().out


def test_options_that_it_does_not_have_are_refused_by_name(stripes):
    with pytest.raises(ConfigError, match="data.place is not supported for stripes; leave it out"):
        Data("stripes", place="somewhere")
    with pytest.raises(ConfigError, match="data.split is not supported for stripes"):
        Data("stripes", split="whole_fields")
    with pytest.raises(ConfigError, match="data.name is 'dots'; expected one of 'indian_pines', .*'stripes'"):
        Data("dots")


@pytest.mark.parametrize("name", DATA_MODULES)
def test_every_module_is_named_after_its_set(name):
    kind = DATA_MODULES[name]
    assert kind.__module__ == f"dynanet.datamodules.{name}" and kind.__doc__
    assert kind.__name__.lower() == f"{name.replace('_', '')}datamodule"
