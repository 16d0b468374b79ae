"""Neural networks that decide, input by input, how much to compute, and that really skip what they decide to skip.

A dynamic layer *runs* a unit *only* for the rows that keep it: it masks (dense, for training) or gathers (sparse, for
speed), and both answer the same.

    model = dynanet.zoo.msdnets(num_classes=10)
    cost = dynanet.CostModel(model, example)                        # what every unit costs
    frontier = dynanet.calibrate.frontier(model, held_out, cost)       # one pass; then any budget
    model = frontier.at(dynanet.Budget(macs=0.5 * cost.full))
    session = dynanet.session.Session(model, example)                 # really sparse
    answers = session(x)

Shape suffixes in dense code: B batch, C channels, H height, W width, T tokens or time steps, D features.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynanet.core.budget import Budget
from dynanet.core.cost import CostModel
from dynanet.core.decision import Decision
from dynanet.core.dynamic import Dynamic, execute, forced, record
from dynanet.core.errors import DynanetError
from dynanet.core.gate import Gate
from dynanet.core.halt import Halt
from dynanet.core.trace import Trace

if TYPE_CHECKING:
    from dynanet import bench as bench
    from dynanet import calibrate as calibrate
    from dynanet import data as data
    from dynanet import datamodules as datamodules
    from dynanet import experiment as experiment
    from dynanet import export as export
    from dynanet import gates as gates
    from dynanet import generate as generate
    from dynanet import mechanisms as mechanisms
    from dynanet import nets as nets
    from dynanet import ops as ops
    from dynanet import report as report
    from dynanet import session as session
    from dynanet import tasks as tasks
    from dynanet import train as train
    from dynanet import zoo as zoo
    from dynanet.core.convert import convert as convert
    from dynanet.zoo.saved import load as load

__version__ = "0.1.0"

__all__ = [
    "Budget", "CostModel", "Decision", "Dynamic", "DynanetError", "Gate", "Halt", "Trace",
    "convert", "execute", "forced", "load", "record",
]  # fmt: skip

_FOLDERS = (
    "bench", "calibrate", "data", "datamodules", "experiment", "export", "gates", "generate", "mechanisms", "nets",
    "ops", "report", "session", "tasks", "train", "zoo",
)  # fmt: skip
_ELSEWHERE = {"convert": "dynanet.core.convert", "load": "dynanet.zoo.saved"}


def __getattr__(name: str) -> Any:
    """Folders and the heavier functions are imported when they are first used."""
    if name in _FOLDERS:
        return import_module(f"dynanet.{name}")
    if name in _ELSEWHERE:
        return getattr(import_module(_ELSEWHERE[name]), name)
    raise AttributeError(f"module 'dynanet' has no attribute {name!r}")
