"""Experiments: data, model and recipe as one configuration, and the run folder that holds the results.

    run = Run(Path("runs/digits"), Experiment(Data("digits"), Model("staged_resnet")))
    run.train()
    run.calibrate(RequestedBudgets(shares=(0.5,)))
    run.evaluate()

Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynanet.experiment.budgets import RequestedBudgets as RequestedBudgets
    from dynanet.experiment.config import Data as Data
    from dynanet.experiment.config import Experiment as Experiment
    from dynanet.experiment.config import Model as Model
    from dynanet.experiment.config import Recipe as Recipe
    from dynanet.experiment.prediction import predict as predict
    from dynanet.experiment.report import static_point as static_point
    from dynanet.experiment.report import write_report as write_report
    from dynanet.experiment.run import Run as Run

_WHERE = {
    "Data": "dynanet.experiment.config",
    "Experiment": "dynanet.experiment.config",
    "Model": "dynanet.experiment.config",
    "Recipe": "dynanet.experiment.config",
    "RequestedBudgets": "dynanet.experiment.budgets",
    "Run": "dynanet.experiment.run",
    "predict": "dynanet.experiment.prediction",
    "static_point": "dynanet.experiment.report",
    "write_report": "dynanet.experiment.report",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
